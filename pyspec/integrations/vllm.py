"""pyspec's drafters inside vLLM, as custom proposers.

    LLM(model, speculative_config={
        "method": "custom_class",
        "model": "pyspec.integrations.vllm.LookupProposer",
        "num_speculative_tokens": 8,
    })

vLLM verifies chains and shows a proposer tokens, not logits: so these are the drafters that learn from tokens alone,
and of each tree the likeliest path. Its interface for proposers is experimental; it is that of vLLM 0.33.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from pyspec.drafters import Drafter
from pyspec.drafters.table_drafter import TableDrafter
from pyspec.drafters.tables.lookup import Lookup
from pyspec.drafters.tables.suffix import Suffix
from pyspec.integrations import require

LEAST_CHANCE = 0.2  # of a draft that is worth verifying


def register() -> None:
    """Makes torch.ops.pyspec known; vLLM's plugin loader calls it in each of its processes. It changes nothing else."""
    import pyspec.ops  # noqa: F401


class Proposer:
    """Drafts for every row of vLLM's batch; the base of the proposers.

    Rows are told apart by their tokens, because vLLM moves requests from row to row without a word.
    """

    def __init__(self, vllm_config):
        require("vllm", "0.33", "0.34")
        self._most = vllm_config.speculative_config.num_speculative_tokens
        self._length = vllm_config.model_config.max_model_len
        self._drafter = self.make(vllm_config.model_config.get_vocab_size())
        self._rows: dict[int, tuple[np.ndarray, Drafter]] = {}  # what was read of a row, and its drafter

    def make(self, vocab_size: int) -> Drafter:
        """The drafter that each request starts from."""
        raise NotImplementedError  # abstract: each proposer has its own

    def load_model(self, *args, **kwargs) -> None:
        """There is no model."""

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings=None,
    ) -> list[list[int]]:
        """Drafts at most num_speculative_tokens for each row; none for a row that has nothing new or no room.

        Args:
            sampled_token_ids: the new tokens of each row.
            num_tokens_no_spec: [rows] integers, the tokens of each row without drafts.
            token_ids_cpu: [rows, max_model_len] integers, those tokens.
        """
        known, self._rows = self._rows, {}
        drafts = []
        for row, new in enumerate(sampled_token_ids):
            count = int(num_tokens_no_spec[row])
            most = min(self._most, self._length - count)
            if not len(new) or most < 1:
                drafts.append([])
                if row in known:  # a row that sits out, such as a prompt that is read in chunks
                    self._rows[row] = known[row]
                continue
            context = token_ids_cpu[row, :count]
            drafter = _continued(known, row, context) or self._drafter.start([])
            self._rows[row] = context.copy(), drafter
            tree = drafter.propose(context.tolist(), 2 * most + 2).likeliest_path().first(most + 1)
            drafts.append(_worth_it(tree))
        return drafts


class LookupProposer(Proposer):
    """Prompt lookup: what followed earlier occurrences of the newest tokens in the request."""

    def make(self, vocab_size: int) -> Drafter:
        return TableDrafter([Lookup(vocab_size)])


class SuffixProposer(Proposer):
    """Suffix lookup: what followed their longest earlier occurrence, in the request or in earlier ones."""

    def make(self, vocab_size: int) -> Drafter:
        return TableDrafter([Suffix(vocab_size)])  # its tables are never saved


def _continued(known: dict[int, tuple[np.ndarray, Drafter]], row: int, context: np.ndarray) -> Drafter | None:
    """The drafter that has read the beginning of a context, its own row's first; taken out of known."""
    is_beginning = partial(_is_beginning, context=context)
    for other in sorted(known, key=lambda other: other != row):
        read, drafter = known[other]
        if is_beginning(read):
            del known[other]
            return drafter
    return None


def _is_beginning(read: np.ndarray, context: np.ndarray) -> bool:
    return len(read) <= len(context) and np.array_equal(read, context[: len(read)])


def _worth_it(chain) -> list[int]:
    tokens = chain.tokens[1:].tolist()
    if chain.chances is None:
        return tokens
    count = int((chain.chances[1:] >= LEAST_CHANCE).sum())  # chances only fall along a path
    return tokens[:count]
