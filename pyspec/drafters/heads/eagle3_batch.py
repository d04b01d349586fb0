"""The sequences that an EAGLE-3 head drafts for, in one cache: each level of all their trees is one call of the head.

Rows of the text are committed as soon as they are read. A tree's guesses lie behind them as scratch: a node that is
asked for its law has its key in the next slot, and the nodes below it find that there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyspec.caches.dense import DenseCache, slots_for
from pyspec.drafters.heads.eagle3 import Eagle3Head
from pyspec.ops.row_statistics import TOP
from pyspec.runners._inference import inference
from pyspec.runners.replay import Replays, Rows, Step, TapeRecorder
from pyspec.runners.verified import Verified
from pyspec.sampling.sampler import Sampler
from pyspec.tree import DraftTree

__all__ = ["Asked", "HeadBatch", "HeadLaws"]

CHUNK = 128  # tokens of a sequence in a call
LEAST_SLOTS = 512  # of a sequence in the head's cache: longer texts make it anew, twice as long


class Asked(NamedTuple):
    """Nodes of a growing tree whose laws are wanted."""

    tokens: Sequence[int]  # of the tree, in the head's vocabulary; the root's is not read
    parents: Sequence[int]
    nodes: Sequence[int]


class _Said(NamedTuple):
    """What a head said after a row."""

    rows: Verified  # of a whole call
    row: int
    given: Tensor  # [H] fp32, which guesses below it take in

    @property
    def logits(self) -> Tensor:
        return self.rows.logits[self.row]


@dataclass(frozen=True)
class _Level:
    """Some nodes of a tree, as a runner's trees are filled in: see pyspec.runners.numbers.Numbers."""

    tokens: np.ndarray
    parents: np.ndarray
    depths: np.ndarray
    ancestor_bits: np.ndarray
    earlier: int

    def __len__(self) -> int:
        return len(self.tokens)


class HeadLaws:
    """The laws of a head below one text, over its own tokens: a LawSource.

    Args:
        batch: whose `read` has read the text.
        sequence: the text's number there.
        sampler: makes laws of logits.
    """

    def __init__(self, batch: HeadBatch, sequence: int, sampler: Sampler):
        self.vocab_size = batch.head.vocab_size
        self._batch, self._sequence, self._sampler = batch, sequence, sampler
        self._said = {0: batch.roots[sequence]}
        self._depths, self._bits = {0: -1}, {0: 0}  # the root is committed

    def laws(self, tokens: Sequence[int], parents: Sequence[int], nodes: Sequence[int]) -> np.ndarray:
        said = self._rows(Asked(tokens, parents, nodes))
        return np.stack([self._sampler.probabilities(each.logits).numpy() for each in said])

    def likeliest(self, tokens: Sequence[int], parents: Sequence[int], nodes: Sequence[int], count: int):
        """The likeliest tokens and their chances, read in one pass, where the law is a plain softmax."""
        sampler = self._sampler
        if (sampler.temperature, sampler.top_k, sampler.top_p) != (1.0, 0, 1.0) or count > TOP:
            return None
        found = [(each.rows.statistics, each.row) for each in self._rows(Asked(tokens, parents, nodes))]
        logits = np.array([rows.top_logits[row, :count] - rows.log_sum_exp[row] for rows, row in found])
        return np.array([rows.top_tokens[row, :count] for rows, row in found]), np.exp(logits)

    def statistics(self, tokens: Sequence[int], parents: Sequence[int], nodes: Sequence[int]):
        """The 8 best chances and the entropy of each law, where it is a plain softmax."""
        sampler = self._sampler
        if (sampler.temperature, sampler.top_k, sampler.top_p) != (1.0, 0, 1.0):
            return None
        found = [(each.rows.statistics, each.row) for each in self._rows(Asked(tokens, parents, nodes))]
        logits = np.array([rows.top_logits[row] - rows.log_sum_exp[row] for rows, row in found])
        return np.exp(logits), np.array([rows.entropy[row] for rows, row in found])

    def _rows(self, asked: Asked) -> list[_Said]:
        if not self._said.keys() >= set(asked.nodes):
            self._batch.guess({self._sequence: (self, asked)})
        return [self._said[node] for node in asked.nodes]

    def level(self, asked: Asked) -> tuple[_Level | None, list[Tensor]]:
        """The nodes that the head has not read yet, None if it has read all, and their hidden rows [H]."""
        nodes = [node for node in asked.nodes if node not in self._said]
        if not nodes:
            return None, []
        earlier, parents = len(self._said) - 1, [asked.parents[node] for node in nodes]
        for place, (node, parent) in enumerate(zip(nodes, parents, strict=True), start=earlier):
            self._depths[node] = self._depths[parent] + 1
            self._bits[node] = self._bits[parent] | 1 << place
        nbytes = 4 * ((earlier + len(nodes) + 31) // 32)
        bits = b"".join(self._bits[node].to_bytes(nbytes, "little") for node in nodes)
        level = _Level(
            self._batch.head.target_tokens(np.array([asked.tokens[node] for node in nodes])),
            np.full(len(nodes), -1, np.int32),
            np.array([self._depths[node] for node in nodes], np.int32),
            np.frombuffer(bits, "<i4").reshape(len(nodes), -1),
            earlier,
        )
        return level, [self._said[parent].given for parent in parents]

    def take(self, asked: Asked, rows: Verified, first: int, given: Tensor) -> None:
        """Keeps what the head said of a level, whose rows begin at `first`."""
        nodes = [node for node in asked.nodes if node not in self._said]
        for row, (node, hidden) in enumerate(zip(nodes, given, strict=True), start=first):
            self._said[node] = _Said(rows, row, hidden)


class HeadBatch:
    """The texts in a head's cache, and what is to be read of each.

    Attributes:
        roots: by sequence, what the head said after the text that was read last.
    """

    def __init__(self, head: Eagle3Head):
        self.head, self.device = head, head.device
        self.roots: dict[int, _Said] = {}
        self._unread: list[list[Tensor]] = []  # by sequence, hidden rows [n, H] of tokens behind its committed ones
        self._cache: DenseCache | None = None
        self._hidden: Mapping[int, Tensor] = {}  # by sequence, of the rows that a call reads
        self._step = Step(self._embed, head.forward)

    @property
    def has_begun(self) -> bool:
        return any(self._unread) or self._cache is not None

    def add(self) -> int:
        """The number of a new sequence."""
        self._unread.append([])
        return len(self._unread) - 1

    def has_read(self, sequence: int, count: int) -> bool:
        """Whether it has taken in what the target said of exactly so many tokens."""
        return count > 0 and self.length(sequence) + sum(map(len, self._unread[sequence])) == count

    def length(self, sequence: int) -> int:
        """Committed rows: one for each token of the text that was read, but the first."""
        return 0 if self._cache is None else self._cache.lengths[sequence]

    @inference
    def take(self, sequence: int, taps: Tensor) -> None:
        """Notes what the target said of a sequence's next tokens, [n, taps, hidden]."""
        self._unread[sequence].append(self.head.hidden_rows(taps))

    @inference
    def read(self, contexts: Mapping[int, Sequence[int]]) -> None:
        """Commits all rows of some texts, by sequence, of which the target has said all but the last token's."""
        self._make_room(max(len(context) + len(context) // 4 for context in contexts.values()))
        unread = {each: torch.cat(self._unread[each]) for each in sorted(contexts) if self._unread[each]}
        first = 0
        while pieces := {each: rows[first : first + CHUNK] for each, rows in unread.items() if len(rows) > first}:
            chains = {}
            for each, piece in pieces.items():
                begin = self.length(each) + 1
                chains[each] = DraftTree.chain(contexts[each][begin : begin + len(piece)])
            found = self._run(chains, pieces, advances=list(chains))
            first += CHUNK
            ends = {}
            for each, end in zip(chains, accumulate(map(len, chains.values())), strict=True):
                self._cache.advance(each, len(chains[each]))
                if len(unread[each]) <= first:
                    ends[each] = end - 1
            if ends:
                last = torch.tensor(list(ends.values()), device=self.device)
                rows = Verified(self.head.logits(found.of_trees(found.hidden)[last]))
                given = found.of_trees(found.taps[0])[last]
                self.roots |= {each: _Said(rows, row, given[row]) for row, each in enumerate(ends)}
        for each in unread:
            self._unread[each] = []

    @inference
    def guess(self, asked: Mapping[int, tuple[HeadLaws, Asked]]) -> None:
        """Reads the nodes that are asked for of several trees, by sequence, in one call."""
        levels, hidden = {}, {}
        for sequence in sorted(asked):
            laws, nodes = asked[sequence]
            level, given = laws.level(nodes)
            if level is not None:
                levels[sequence], hidden[sequence] = level, torch.stack(given)
        if not levels:
            return
        self._make_room(max(self.length(each) + level.earlier + len(level) for each, level in levels.items()))
        found = self._run(levels, hidden)
        rows, given = Verified(self.head.logits(found.of_trees(found.hidden))), found.of_trees(found.taps[0]).clone()
        first = 0
        for sequence, level in levels.items():
            laws, nodes = asked[sequence]
            laws.take(nodes, rows, first, given[first : first + len(level)])
            first += len(level)

    def _run(self, trees: Mapping, hidden: Mapping[int, Tensor], advances: Collection[int] = ()) -> Rows:
        self._hidden = hidden
        return self._replays.run(self._step, trees, advances)

    def _embed(self, tokens: Tensor) -> Tensor:
        parts = list(self._hidden.values())
        hidden = parts[0] if len(parts) == 1 else torch.cat(parts)
        if len(hidden) < len(tokens):  # on a GPU all sequences are padded to one number of rows
            each, hidden = len(tokens) // len(self._unread), hidden.new_zeros(len(tokens), hidden.shape[1])
            for sequence, part in self._hidden.items():
                hidden[sequence * each : sequence * each + len(part)] = part
        return self.head.rows(tokens, hidden)

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
