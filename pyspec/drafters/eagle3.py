"""Trees from a trained EAGLE-3 head, which reads what the target's layers said of the text. arXiv 2503.01840."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyspec.caches.dense import DenseCache, slots_for
from pyspec.checkpoints.sources import find_source
from pyspec.drafters.heads.eagle3 import Eagle3Head
from pyspec.drafters.shapes import GrowthPolicy, check_temperature, path_to
from pyspec.drafters.shapes.by_rule import growth_for
from pyspec.ops.row_statistics import TOP
from pyspec.runners import Runner
from pyspec.runners._inference import inference
from pyspec.runners.exclusive import lock_of
from pyspec.runners.replay import Replays, Step, TapeRecorder
from pyspec.runners.verified import Verified
from pyspec.sampling.noise import Noise
from pyspec.sampling.sampler import Sampler
from pyspec.tree import DraftTree

CHUNK = 128  # tokens of a prompt in a call
LEAST_SLOTS = 512  # of a sequence in the head's cache: longer texts make it anew, twice as long


class Eagle3:
    """Grows trees from the laws of an EAGLE-3 head.

    Each level of a tree is one call of the head. Its keys follow the accepted text: those that it made from its own
    guesses are scratch, and what was accepted is read again with what the target said of it.

    Args:
        head: a folder, or a hub id, with config.json and safetensors (or pytorch_model.bin, read as tensors alone); or
            an Eagle3Head.
        target: the runner to draft for.
        growth: by default the likeliest paths, which acceptance="exact" fits; growth_for finds what fits another rule.
            A policy that draws makes the drafter "sampled".
        weights: dtype of the head's matrices; by default int8 on a CPU, bfloat16 elsewhere.
        taps: the target's layers that it reads, where its config.json is known to name others.
        temperature, top_k, top_p: of the head's laws, see Sampler; a drafter that draws needs a temperature above 0.
        seed: of the draws.

    Raises:
        FileNotFoundError, ValueError: see Eagle3Head.load; or for a target without taps, or a policy that draws at
            temperature 0.
    """

    def __init__(
        self,
        head: str | Path | Eagle3Head,
        target: Runner,
        growth: GrowthPolicy | None = None,
        *,
        weights: torch.dtype | str | None = None,
        taps: Sequence[int] | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ):
        self.growth = growth_for("exact") if growth is None else growth
        self.proposal, self.siblings = self.growth.proposal, self.growth.siblings
        self._sampler = Sampler(temperature, top_k, top_p, seed)
        check_temperature(self.growth, temperature)
        if not hasattr(target, "layers"):
            raise ValueError(
                f"target must be a runner with taps, such as pyspec.load gives, got {type(target).__name__}"
            )
        self.head = head if isinstance(head, Eagle3Head) else Eagle3Head.load(find_source(head), target, weights, taps)
        self.taps = self.head.config.taps
        self._vocab_size, self._context_length = target.vocab_size, target.context_length
        self._batch: _Batch | None = None
        self._sequence = -1

    def start(self, prompt: Sequence[int]) -> Eagle3:
        """A drafter for one more sequence of the batch; of a new batch once the last one has begun to read."""
        drafter = copy.copy(self)
        with lock_of(self.head):
            if self._batch is None or self._batch.has_begun:
                self._batch = _Batch(self.head)
            drafter._batch, drafter._sequence = self._batch, self._batch.add()
        return drafter

    def propose(self, context: Sequence[int], budget: int) -> DraftTree:
        """A tree of at most budget nodes below context[-1]; the root alone where the target's context ends."""
        budget = min(budget, self._context_length - len(context))
        if budget <= 1 or not self._batch.has_read(self._sequence, len(context) - 1):
            return DraftTree.chain(context[-1:])
        noise = Noise(self._sampler.seed, len(context), Noise.DRAFTS)
        source = _Laws(self._batch, self._sequence, context, self._sampler)
        tree = self.growth.grow(source, 0, budget, noise)  # in the head's tokens, of which the root may be none
        tokens = self.head.target_tokens(tree.tokens)
        tokens[0] = context[-1]
        q = None
        if tree.q is not None:
            q = np.zeros((len(tree), self._vocab_size))
            q[:, self.head.target_tokens(np.arange(tree.q.shape[1]))] = tree.q
        return DraftTree(tokens, tree.parents, q=q, chances=tree.chances)

    def observe(self, tree: DraftTree, verified: Verified, path: Sequence[int]) -> None:
        """Keeps what the target's layers said of the accepted path."""
        self._batch.take(self._sequence, verified.taps[list(path)])


class _Laws:
    """The laws of the head below a context, over its own tokens: a LawSource."""

    def __init__(self, batch: _Batch, sequence: int, context: Sequence[int], sampler: Sampler):
        self.vocab_size = batch.head.vocab_size
        self._batch, self._sequence, self._sampler = batch, sequence, sampler
        self._root = int(context[-1])
        self._root_hidden = batch.read(sequence, context)
        self._given: dict[int, Tensor] = {}  # by node, the hidden row that guesses below it take in

    def laws(self, tokens: Sequence[int], parents: Sequence[int], nodes: Sequence[int]) -> np.ndarray:
        rows = self._logits(tokens, parents, nodes)
        return np.stack([self._sampler.probabilities(row).numpy() for row in rows])

    def likeliest(self, tokens: Sequence[int], parents: Sequence[int], nodes: Sequence[int], count: int):
        """The likeliest tokens and their chances, read in one pass, where the law is a plain softmax."""
        sampler = self._sampler
        if (sampler.temperature, sampler.top_k, sampler.top_p) != (1.0, 0, 1.0) or count > TOP:
            return None
        found = Verified(self._logits(tokens, parents, nodes)).statistics
        chances = np.exp(found.top_logits - found.log_sum_exp[:, None])
        return found.top_tokens[:, :count], chances[:, :count]

    def _logits(self, tokens: Sequence[int], parents: Sequence[int], nodes: Sequence[int]) -> Tensor:
        """[len(nodes), draft vocabulary] fp32 after some nodes."""
        kept = sorted({node for asked in nodes for node in path_to(asked, parents)})
        places = {node: place for place, node in enumerate(kept)}
        of_target = self._batch.head.target_tokens(np.array([tokens[node] for node in kept]))
        of_target[0] = self._root
        tree = DraftTree(of_target, [places.get(parents[node], -1) for node in kept])
        hidden = [self._given[parents[node]] if node else self._root_hidden for node in kept]
        logits, given = self._batch.guess(self._sequence, tree, hidden)
        self._given |= dict(zip(kept, given, strict=True))
        return logits[[places[node] for node in nodes]]


class _Batch:
    """The sequences whose texts are in the head's cache, and what is to be read of each."""

    def __init__(self, head: Eagle3Head):
        self.head, self.device = head, head.device
        self._unread: list[list[Tensor]] = []  # by sequence, hidden rows [n, H] of tokens behind its committed ones
        self._cache: DenseCache | None = None
        self._hidden: Tensor | None = None  # of the rows that a call reads
        self._step = Step(lambda tokens: head.rows(tokens, self._hidden), head.forward)

    @property
    def has_begun(self) -> bool:
        return any(self._unread) or self._cache is not None

    def add(self) -> int:
        """The number of a new sequence."""
        self._unread.append([])
        return len(self._unread) - 1

    def has_read(self, sequence: int, count: int) -> bool:
        """Whether it has taken in what the target said of exactly so many tokens."""
        return count > 0 and self._length(sequence) + sum(map(len, self._unread[sequence])) == count

    @inference
    def take(self, sequence: int, taps: Tensor) -> None:
        """Notes what the target said of a sequence's next tokens, [n, taps, hidden]."""
        self._unread[sequence].append(self.head.hidden_rows(taps))

    @inference
    def read(self, sequence: int, context: Sequence[int]) -> Tensor:
        """Commits all rows of a text but that of its last token, whose hidden row [H] comes back."""
        hidden = torch.cat(self._unread[sequence])
        start = self._length(sequence)
        self._make_room(len(context) + len(context) // 4)
        for first in range(0, len(hidden) - 1, CHUNK):
            last = min(first + CHUNK, len(hidden) - 1)
            chain = DraftTree.chain(context[start + first + 1 : start + last + 1])
            self._run(sequence, chain, hidden[first:last], advances=[sequence])
            self._cache.advance(sequence, len(chain))
        self._unread[sequence] = [hidden[-1:]]
        return hidden[-1]

    @inference
    def guess(self, sequence: int, tree: DraftTree, hidden: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits [T, draft vocabulary] after the nodes of a tree, and [T, H] that guesses below them take in."""
        self._make_room(self._length(sequence) + len(tree))
        rows = self._run(sequence, tree, torch.stack(list(hidden)))
        return self.head.logits(rows.hidden), rows.taps[0].clone()

    def _run(self, sequence: int, tree: DraftTree, hidden: Tensor, advances: Sequence[int] = ()):
        self._hidden = hidden
        return self._replays.run(self._step, {sequence: tree}, advances)

    def _length(self, sequence: int) -> int:
        return 0 if self._cache is None else self._cache.lengths[sequence]

    def _make_room(self, slots: int) -> None:
        """Makes a larger cache where this one is too small for so many slots of a sequence."""
        old = self._cache
        if old is not None and slots < old.slots:
            return
        shape, slots = self.head.config.layers, slots_for(max(LEAST_SLOTS, 2 * slots))
        size = (shape.layers, len(self._unread), shape.kv_heads, slots, shape.head_dim)
        cache = DenseCache(*size, self.head.dtype, self.device, shape.ropes(slots, self.device))
        if old is not None:
            cache.keys_values[..., : old.slots, :] = old.keys_values
            cache.lengths = list(old.lengths)
        self._cache, self._replays = cache, Replays(cache, TapeRecorder())  # on a GPU, launch by launch
