"""A smaller model as the drafter of a larger one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from weakref import WeakKeyDictionary, WeakSet, ref

import numpy as np
import torch

from pyspec.drafters.shapes import GrowthPolicy, check_temperature, path_to
from pyspec.drafters.shapes.by_rule import growth_for
from pyspec.ops.row_statistics import TOP
from pyspec.runners import Runner
from pyspec.runners.exclusive import lock_of
from pyspec.runners.verified import Verified
from pyspec.sampling.noise import Noise
from pyspec.sampling.sampler import InvalidLogits, Sampler
from pyspec.tree import DraftTree

LEAST_SLOTS = 512  # of a sequence in the draft model's state: longer texts make it anew, twice as long


class ModelDrafter:
    """Grows trees from the laws of a draft model, which reads the same tokens as the target.

    Each level of a tree is one call of the draft model. Its state follows the accepted text: what was accepted since
    the last round is read together with the root of the next tree. It stops drafting where its context ends.

    Args:
        draft: any runner but the target itself.
        target: the model to draft for.
        growth: by default the likeliest paths, which acceptance="exact" fits; growth_for finds what fits another rule.
            A policy that draws makes the drafter "sampled".
        temperature, top_k, top_p: of the draft's laws, see Sampler; a drafter that draws needs a temperature above 0.
        seed: of the draws.

    Raises:
        ValueError: if the vocabularies differ, or for a policy that draws at temperature 0.
    """

    def __init__(
        self,
        draft: Runner,
        target: Runner,
        growth: GrowthPolicy | None = None,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ):
        if draft is target:
            raise ValueError("draft must be another runner than target: their states differ during a round")
        _check_vocabularies(draft, target)
        self._set_up(draft, growth, temperature, top_k, top_p, seed)

    goes_on = None  # see Drafter

    @property
    def fingerprint(self) -> str:
        """Names the draft model."""
        return self._draft.fingerprint

    def _set_up(self, draft: Runner, growth: GrowthPolicy | None, temperature, top_k, top_p, seed) -> None:
        self.growth = growth_for("exact") if growth is None else growth
        self.proposal, self.siblings = self.growth.proposal, self.growth.siblings
        self._sampler = Sampler(temperature, top_k, top_p, seed)
        check_temperature(self.growth, temperature)
        self._draft = draft
        self._batch: _Batch | None = None
        self._started: WeakSet[ModelDrafter] = WeakSet()  # of the batch
        self._sequence = -1

    def start(self, prompt: Sequence[int]) -> ModelDrafter:
        """A drafter for one more sequence of the batch; of a new batch once the last one has begun to draft."""
        drafter = copy.copy(self)
        with lock_of(self._draft):
            if self._batch is None or self._batch.capacity:
                self._batch, self._started = self._new_batch(), WeakSet()
            drafter._batch, drafter._sequence = self._batch, self._batch.add(prompt)
            self._started.add(drafter)
        return drafter

    def propose(self, context: Sequence[int], budget: int) -> DraftTree:
        """A tree of at most budget nodes below context[-1]; the root alone where the draft's context ends."""
        room = self._draft.context_length - len(context)
        if budget == 1 or room < 1 or len(context) == 1:  # there is nothing to read before the only token
            return DraftTree.chain(context[-1:])
        source = _Laws(self._batch, self._sequence, context, self._sampler)
        noise = Noise(self._sampler.seed, len(context), Noise.DRAFTS)
        with lock_of(self._draft):
            # a tree of as many nodes as the context has room for is never too deep for it
            return self.growth.grow(source, int(context[-1]), min(budget, room), noise, self.goes_on)

    def observe(self, tree: DraftTree, verified: Verified, path: Sequence[int]) -> None:
        """Nothing is learned: the next round reads the context."""

    def _new_batch(self) -> _Batch:
        # beside texts that go on, in an engine, a batch has a state of its own, or each would take the other's away
        return _Batch(self._draft.fork() if self._started else self._draft)


class _Laws:
    """The laws of the draft model below a context: a LawSource."""

    def __init__(self, batch: _Batch, sequence: int, context: Sequence[int], sampler: Sampler):
        self.vocab_size = batch.runner.vocab_size
        self._batch, self._sequence, self._context, self._sampler = batch, sequence, context, sampler
        self._found: tuple[np.ndarray, np.ndarray] | None = None

    def laws(self, tokens: Sequence[int], parents: Sequence[int], nodes: Sequence[int]) -> np.ndarray:
        rows = np.full((len(nodes), self.vocab_size), 1 / self.vocab_size)
        paths = self._paths(parents, nodes)
        if not paths:
            return rows
        logits, places = self._logits(tokens, parents, paths)
        for row, node in zip(rows, nodes, strict=True):
            try:
                if node in paths:
                    row[:] = self._sampler.probabilities(logits[places[node]]).numpy()
            except InvalidLogits as error:
                raise ValueError(f"the draft model's logits after token {tokens[node]} are {error}") from error
        return rows

    def likeliest(self, tokens: Sequence[int], parents: Sequence[int], nodes: Sequence[int], count: int):
        """The likeliest tokens and their chances, read in one pass, where all laws are plain softmaxes."""
        self._found = None
        sampler, paths = self._sampler, self._paths(parents, nodes)
        is_plain = (sampler.temperature, sampler.top_k, sampler.top_p) == (1.0, 0, 1.0)
        if not is_plain or count > TOP or not paths.keys() >= set(nodes):
            return None
        logits, places = self._logits(tokens, parents, paths)
        found, rows = Verified(logits).statistics, [places[node] for node in nodes]
        if not np.isfinite(found.log_sum_exp[rows]).all():  # laws says where
            return None
        chances = np.exp(found.top_logits[rows] - found.log_sum_exp[rows, None])
        self._found = chances, found.entropy[rows]
        return found.top_tokens[rows, :count], chances[:, :count]

    def statistics(self, tokens: Sequence[int], parents: Sequence[int], nodes: Sequence[int]):
        """The best chances and the entropy of the laws that `likeliest` was asked for last."""
        return self._found

    def _paths(self, parents: Sequence[int], nodes: Sequence[int]) -> dict[int, list[int]]:
        """The paths to those nodes that the draft's context has room for."""
        # Reranked asks below deeper nodes than its tree can have: where the draft's context has ended, all is as likely
        room = self._batch.runner.context_length - len(self._context)
        return {node: path for node in nodes if len(path := path_to(node, parents)) - 1 <= room}

    def _logits(self, tokens: Sequence[int], parents: Sequence[int], paths: dict[int, list[int]]):
        """Logits of the nodes on some paths, and the row of each node."""
        kept = sorted({node for path in paths.values() for node in path})
        places = {node: place for place, node in enumerate(kept)}
        logits = self._batch.logits(
            self._sequence,
            self._context,
            [tokens[node] for node in kept],
            [places.get(parents[node], -1) for node in kept],
        )
        return logits, places


# whose texts a draft model has in its state; the batch holds the model, so that nothing here may hold the batch
_owners: WeakKeyDictionary[Runner, ref[_Batch]] = WeakKeyDictionary()


class _Batch:
    """The sequences whose texts are the draft model's state."""

    def __init__(self, runner: Runner):
        self.runner = runner
        self.capacity = 0  # slots of a sequence; 0 until the first call
        self._texts: list[list[int]] = []

    def add(self, prompt: Sequence[int]) -> int:
        """The number of a new sequence."""
        self._texts.append(list(prompt))
        return len(self._texts) - 1

    def logits(self, sequence: int, context: Sequence[int], tokens: list[int], parents: list[int]) -> torch.Tensor:
        """Logits [T, V] of a tree below context, whose last token is the root. Reads what is new of the context."""
        text, slots = list(context[:-1]), len(context) + len(tokens)
        self._texts[sequence] = text
        owner = _owners.get(self.runner)
        is_mine = owner is not None and owner() is self
        if not is_mine or slots > self.capacity or self.runner.lengths()[sequence] > len(text):
            self._begin(slots)
        unread = text[self.runner.lengths()[sequence] :]
        first = len(unread)
        chain = range(-1, first - 1)
        tree = DraftTree(
            [*unread, *tokens], [*chain, *(first + parent if parent >= 0 else first - 1 for parent in parents)]
        )
        logits = self.runner.verify({sequence: tree})[sequence].logits
        if first:
            self.runner.commit({sequence: range(first)})
        return logits[first:]

    def _begin(self, slots: int) -> None:
        self.capacity = max(LEAST_SLOTS, 2 * max(slots, *map(len, self._texts)))
        self.runner.prefill(self._texts, capacity=self.capacity)
        _owners[self.runner] = ref(self)


def _check_vocabularies(draft: Runner, target: Runner) -> None:
    if draft.vocab_size != target.vocab_size:
        raise ValueError(f"draft must have target's vocabulary of {target.vocab_size} tokens, got {draft.vocab_size}")
    if draft.tokenizer is None or target.tokenizer is None:
        return
    if draft.tokenizer.fingerprint != target.tokenizer.fingerprint:
        raise ValueError(
            "draft must have target's tokenizer, but the same number stands for another token in the two: their "
            f"vocabularies are {draft.tokenizer.fingerprint} and {target.tokenizer.fingerprint}"
        )
