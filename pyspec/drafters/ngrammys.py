"""The N-Grammys: what the target emits after one token alone, and what the text has had before."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch

from pyspec.drafters import DRAFTERS, NamedDrafter
from pyspec.drafters.table_drafter import TableDrafter
from pyspec.drafters.tables.bigrams import Bigrams, check_bigrams
from pyspec.drafters.tables.lookup import Lookup
from pyspec.machine import store
from pyspec.ops.row_statistics import TOP
from pyspec.runners import Runner
from pyspec.runners.exclusive import exclusive_use
from pyspec.runners.verified import Verified
from pyspec.tree import DraftTree

BATCH = 256  # tokens that are run side by side


def model_bigrams(model: Runner, progress: Callable[[int, int], None] | None = None) -> np.ndarray:
    """The model's best tokens [V, 8] int32 after each token alone, best first, -1 behind the last.

    Every token is run once, as a prompt of its own, and the result is kept in the user's cache folder. The model's
    batch is lost then. progress is called with (tokens done, tokens).
    """
    key = store.key(model, vocab_size=model.vocab_size, top=TOP)
    try:
        kept = np.frombuffer(base64.b64decode(store.read("bigrams", key)), np.int32).reshape(-1, TOP).copy()
        check_bigrams(kept, model.vocab_size)
        return kept
    except (TypeError, ValueError):  # there is none, or it is damaged
        pass
    rows = []
    with exclusive_use(model):
        for first in range(0, model.vocab_size, BATCH):
            prompts = [[token] for token in range(first, min(first + BATCH, model.vocab_size))]
            rows.append(Verified(torch.stack(model.prefill(prompts, capacity=1))).top_tokens()[0])
            if progress is not None:
                progress(first + len(prompts), model.vocab_size)
    successors = np.concatenate(rows).astype(np.int32)
    store.keep("bigrams", key, base64.b64encode(successors.tobytes()).decode())  # of millions, too slow as numbers
    return successors


class NgrammysRows:
    """The paper's own allocation: `rows` continuations of up to `width` tokens, merged by what they begin with.

    First come the continuations of earlier occurrences of the last token, by how often they occurred and then the
    latest; the rows that are left are the bigrams of the last token, each chained greedily.
    """

    proposal = "deterministic"

    def __init__(self, vocab_size: int, bigrams: np.ndarray, *, rows: int = 10, width: int = 10):
        check_bigrams(bigrams, vocab_size)
        for name, value in (("rows", rows), ("width", width)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.vocab_size, self._bigrams, self._rows, self._width = vocab_size, bigrams, rows, width

    def start(self, prompt: Sequence[int]) -> NgrammysRows:
        """The drafter itself: nothing is kept."""
        return self

    def propose(self, context: Sequence[int], budget: int) -> DraftTree:
        """A tree of at most budget nodes: the rows in their order, until it is full."""
        tokens, parents, places = [int(context[-1])], [-1], {}
        for row in self._continuations(context):
            at = 0
            for token in row:
                if (at, token) not in places:
                    if len(tokens) == budget:
                        return DraftTree(tokens, parents)
                    places[at, token] = len(tokens)
                    tokens.append(token)
                    parents.append(at)
                at = places[at, token]
        return DraftTree(tokens, parents)

    def observe(self, tree: DraftTree, verified: Verified, path: Sequence[int]) -> None:
        """Nothing is learned."""

    def _continuations(self, context: Sequence[int]) -> list[tuple[int, ...]]:
        text = np.asarray(context, np.int64)
        starts = np.flatnonzero(text[: -self._width] == text[-1]) + 1 if len(text) > self._width else []
        windows = [tuple(text[start : start + self._width].tolist()) for start in starts]
        counts, latest = Counter(windows), {window: place for place, window in enumerate(windows)}
        found = sorted(counts, key=lambda window: (-counts[window], -latest[window]))[: self._rows]
        for token in self._bigrams[text[-1]].tolist()[: self._rows - len(found)]:
            row = []
            while token >= 0 and len(row) < self._width:
                row.append(token)
                token = int(self._bigrams[token, 0])
            found.append(tuple(row))
        return found


def _make(runner: Runner) -> TableDrafter:
    tables = [Lookup(runner.vocab_size), Bigrams(runner.vocab_size, model_bigrams(runner))]
    return TableDrafter(tables, runner.fingerprint)


DRAFTERS.register(
    "ngrammys",
    NamedDrafter(_make, fits=lambda runner: hasattr(runner, "prefill"), prepare=model_bigrams),
    "the model's own bigrams and unigram, and the n-grams of this text (N-Grammys)",
)
