"""The sequences that a head drafts for, in one cache: each level of all their trees is one call of the head.

Rows of the text are committed as soon as they are read. A tree's guesses lie behind them as scratch: a node that is
asked for its law has its key in the next slot, and the nodes below it find that there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple
from weakref import finalize

import numpy as np
import torch
from torch import Tensor

from pyspec.drafters.heads.eagle3_room import END, GUESS, READ, HeadRoom
from pyspec.drafters.tables.guesses import GuessedNodes
from pyspec.host import compiled
from pyspec.ops.row_statistics import TOP, row_statistics
from pyspec.runners._inference import inference
from pyspec.runners.replay import Rows
from pyspec.sampling.sampler import Sampler
from pyspec.tree import DraftTree

__all__ = ["Asked", "HeadBatch", "HeadLaws", "said_of"]

CHUNK = 128  # tokens of a sequence in a call
FEW = 16  # rows of a call whose guesses are all made: of more only the last of each sequence
MOST_GUESSES = 64  # of a tree that the host grows: bits of a word there
NOTHING = np.zeros(0, np.float32)
LEAST_SLOTS = 512  # of a sequence in the head's cache: longer texts make it anew, twice as long


class Asked(NamedTuple):
    """Nodes of a growing tree whose laws are wanted."""

    tokens: Sequence[int]  # of the tree, in the head's vocabulary; the root's is not read
    parents: Sequence[int]
    nodes: Sequence[int]


class Said(NamedTuple):
    """What a head said after some rows."""

    given: Tensor  # [R, H] fp32, which guesses below them take in
    logits: Tensor  # [R, draft vocabulary] fp32
    top_tokens: np.ndarray  # [R, 8] int64
    top_logits: np.ndarray  # [R, 8] fp32, less log_sum_exp


@dataclass(frozen=True)
class Level:
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
        self._said: dict[int, tuple[Said, int]] = {}  # of each node that was read, and the row there
        # below the text a node's depth is 0, and it has no ancestors
        self._depths, self._bits, self._committed = {-1: -1}, {-1: 0}, 0
        self._begin()

    def _begin(self) -> None:
        """The root is committed: it is what the text was read to."""
        self._said[0] = self._batch.roots[self._sequence]
        self._depths[0], self._bits[0], self._committed = -1, 0, 1

    def laws(self, tokens: Sequence[int], parents: Sequence[int], nodes: Sequence[int]) -> np.ndarray:
        found = self._rows(Asked(tokens, parents, nodes))
        return np.stack([self._sampler.probabilities(said.logits[row]).numpy() for said, row in found])

    def likeliest(self, tokens: Sequence[int], parents: Sequence[int], nodes: Sequence[int], count: int):
        """The likeliest tokens and their chances, read in one pass, where the law is a plain softmax."""
        if not self._sampler.is_plain or count > TOP:
            return None
        found = self._rows(Asked(tokens, parents, nodes))
        best = np.array([said.top_tokens[row] for said, row in found])
        return best[:, :count], np.exp(np.array([said.top_logits[row] for said, row in found])[:, :count])

    def statistics(self, tokens: Sequence[int], parents: Sequence[int], nodes: Sequence[int]):
        """The 8 best chances and the entropy of each law, where it is a plain softmax."""
        if not self._sampler.is_plain:
            return None
        found = self._rows(Asked(tokens, parents, nodes))
        entropy = row_statistics(torch.stack([said.logits[row] for said, row in found])).entropy
        return np.exp(np.array([said.top_logits[row] for said, row in found])), entropy.cpu().numpy()

    def _rows(self, asked: Asked) -> list[tuple[Said, int]]:
        if not self._said.keys() >= set(asked.nodes):
            self._batch.guess({self._sequence: (self, asked)})
        return [self._said[node] for node in asked.nodes]

    def level(self, asked: Asked) -> tuple[Level, Tensor] | None:
        """The nodes that the head has not read yet, None if it has read all; and what they take in, [n, width] fp32."""
        nodes = self.unread(asked)
        if not nodes:
            return None
        earlier, parents = len(self._said) - self._committed, [asked.parents[node] for node in nodes]
        for place, (node, parent) in enumerate(zip(nodes, parents, strict=True), start=earlier):
            self._depths[node] = self._depths[parent] + 1
            self._bits[node] = self._bits[parent] | 1 << place
        nbytes = 4 * ((earlier + len(nodes) + 31) // 32)
        bits = b"".join(self._bits[node].to_bytes(nbytes, "little") for node in nodes)
        level = Level(
            self._targets(asked, nodes),
            np.full(len(nodes), -1, np.int32),
            np.array([self._depths[node] for node in nodes], np.int32),
            np.frombuffer(bits, "<i4").reshape(len(nodes), -1),
            earlier,
        )
        return level, self._given(asked, nodes)

    def unread(self, asked: Asked) -> list[int]:
        """The nodes that the head has not read yet."""
        return [node for node in asked.nodes if node not in self._said]

    def take(self, asked: Asked, said: Said, first: int) -> None:
        """Keeps what the head said of a level, whose rows begin at `first`."""
        for row, node in enumerate(self.unread(asked), start=first):
            self._said[node] = said, row

    def _targets(self, asked: Asked, nodes: Sequence[int]) -> np.ndarray:
        """[n] int64, the target's tokens of some nodes."""
        return self._batch.head.target_tokens(np.array([asked.tokens[node] for node in nodes]))

    def _given(self, asked: Asked, nodes: Sequence[int]) -> Tensor:
        """What some nodes take in, [n, width] fp32: what the head gave after their parents."""
        above = [self._said[asked.parents[node]] for node in nodes]
        return torch.stack([said.given[row] for said, row in above])


class HeadBatch:
    """The texts in a head's cache, and what is to be read of each.

    Attributes:
        roots: by sequence, what the head said after the text that was read last, and the row there.
    """

    rooms = HeadRoom

    def __init__(self, head):
        self.head, self.device = head, head.device
        self.roots: dict[int, tuple[Said, int]] = {}
        # by sequence, of tokens behind its committed ones: what the target said of each, and which they are
        self._unread: list[list[Tensor]] = []
        self._tokens: list[list[int]] = []
        self._ends: dict[int, object] = {}  # by sequence, roots as the host has them
        self._room: HeadRoom | None = None
        self._leaves: finalize | None = None

    @property
    def has_begun(self) -> bool:
        return any(self._unread) or self._room is not None

    def add(self) -> int:
        """The number of a new sequence."""
        self._unread.append([])
        self._tokens.append([])
        return len(self._unread) - 1

    def has_read(self, sequence: int, count: int) -> bool:
        """Whether it has taken in what the target said of exactly so many tokens."""
        return count > 0 and self.length(sequence) + len(self._tokens[sequence]) == count

    def laws(self, sequence: int, sampler: Sampler) -> HeadLaws:
        """The laws below a text that was read."""
        return HeadLaws(self, sequence, sampler)

    def length(self, sequence: int) -> int:
        """Committed rows: one for each token of the text that was read, but the first."""
        return 0 if self._room is None else self._room.cache.lengths[sequence]

    @property
    def cache(self):
        """The keys and values of all sequences; None before anything was read."""
        return None if self._room is None else self._room.cache

    @inference
    def take(self, sequence: int, tokens: Sequence[int], taps: Tensor) -> None:
        """Notes what the target said of a sequence's next tokens, [n, taps, hidden] fp32; long texts are read."""
        unread, behind = self._unread[sequence], self._tokens[sequence]
        unread.append(taps)
        behind += tokens
        if len(behind) > CHUNK:
            taps, first = _joined(unread), 0
            for first in range(0, len(behind) - CHUNK, CHUNK):  # a row needs the token behind its own
                self._read(READ, {sequence: behind[first + 1 : first + CHUNK + 1]}, {sequence: taps[first:][:CHUNK]})
            unread[:], behind[:] = [taps[first + CHUNK :]], behind[first + CHUNK :]

    def grow(
        self, contexts: Mapping[int, Sequence[int]], budgets: Mapping[int, int], width: int, depth: int, least: float
    ) -> tuple[list[GuessedNodes], int] | None:
        """Reads some texts as `read` does and grows the likeliest paths below them, without Python between two calls.

        Args:
            contexts, budgets: by sequence, which ascend.
            width, depth, least: see TopPaths and Sapling.

        Returns:
            Each tree, and how many levels there were; or None where calls are not recorded, or trees may have more
            guesses than the host counts.
        """
        self._make_room(max(map(len, contexts.values())) + width * depth)
        room = self._room
        if width > TOP or width * (depth - 1) > MOST_GUESSES or not room.is_recorded:
            return None
        tokens, unread = self._to_read(contexts)
        round, lengths = room.round(width, depth, least), room.cache.lengths
        for each, budget in budgets.items():
            rows = unread[each].numpy() if each in unread else NOTHING
            if each not in self._ends:
                self._ends[each] = compiled().HeadSaid()
            round.plant(each, lengths[each], budget, self._ends[each], contexts[each][-1], tokens.get(each, []), rows)
        room.play(round)
        for each, rows in tokens.items():
            room.cache.advance(each, len(rows))
        return [GuessedNodes(*tree) for tree in round.grown()], round.levels

    @inference
    def read(self, contexts: Mapping[int, Sequence[int]]) -> None:
        """Commits all rows of some texts, by sequence, of which the target has said all but the last token's."""
        tokens, unread = self._to_read(contexts)
        if unread:
            said = self._said(self._read(END, tokens, unread))
            ends = accumulate(map(len, tokens.values()))
            self.roots |= {each: (said, end - 1) for each, end in zip(unread, ends, strict=True)}

    def _to_read(self, contexts: Mapping[int, Sequence[int]]) -> tuple[dict[int, list[int]], dict[int, Tensor]]:
        """The rows of some texts that are to be read, by sequence: their tokens and taps. Of many only the last."""
        unread = {each: _joined(self._unread[each]) for each in sorted(contexts) if self._tokens[each]}
        tokens = {each: [*self._tokens[each][1:], contexts[each][-1]] for each in unread}
        for each in unread:
            self._unread[each], self._tokens[each] = [], []
        if sum(map(len, tokens.values())) > FEW:
            longer = [each for each in unread if len(tokens[each]) > 1]
            self._read(READ, {each: tokens[each][:-1] for each in longer}, {each: unread[each][:-1] for each in longer})
            tokens = {each: tokens[each][-1:] for each in unread}
            unread = {each: unread[each][-1:] for each in unread}
        return tokens, unread

    @inference
    def guess(self, asked: Mapping[int, tuple[HeadLaws, Asked]]) -> None:
        """Reads the nodes that are asked for of several trees, by sequence, in one call."""
        levels, hidden = {}, {}
        for sequence in sorted(asked):
            laws, nodes = asked[sequence]
            if (found := laws.level(nodes)) is not None:
                levels[sequence], hidden[sequence] = found
        if not levels:
            return
        self._make_room(max(self.length(each) + level.earlier + len(level) for each, level in levels.items()))
        said, first = self._said(self._room.run(GUESS, levels, hidden)), 0
        for sequence, level in levels.items():
            laws, nodes = asked[sequence]
            laws.take(nodes, said, first)
            first += len(level)

    @inference
    def _read(self, kind: int, tokens: Mapping[int, Sequence[int]], taps: Mapping[int, Tensor]) -> Rows:
        """Commits rows: the tokens behind those that taps are of."""
        self._make_room(max(self.length(each) + len(rows) for each, rows in tokens.items()))
        chains = {each: DraftTree.chain(rows) for each, rows in tokens.items()}
        found = self._room.run(kind, chains, taps, advances=list(chains))
        for each, chain in chains.items():
            self._room.cache.advance(each, len(chain))
        return found

    def _said(self, found: Rows) -> Said:
        """What a call told, in memory of its own."""
        given, logits, *statistics = (found.of_trees(values) for values in found.taps)
        return said_of(given.clone(), logits.clone(), statistics)

    def _make_room(self, slots: int) -> None:
        """Takes a larger room where this one is too small for so many slots of a sequence."""
        old, sequences, spare = self._room, len(self._unread), self.head.rooms
        if old is not None and slots < old.cache.slots:
            return
        slots = max(LEAST_SLOTS, 2 * slots)
        fitting = [room for room in spare if room.sequences == sequences and room.cache.slots >= slots]
        if fitting:
            spare.remove(fitting[0])
            fitting[0].cache.restart(fitting[0].cache.slots)
        self._room = room = fitting[0] if fitting else self.rooms(self.head, sequences, slots)
        # for the next batch. A __del__ would come too late: where a cycle held the batch, the collector has ended the
        # room's tapes by then
        if self._leaves is not None:
            self._leaves.detach()
        self._leaves = finalize(self, spare.append, room)
        self._leaves.atexit = False
        if old is not None:
            room.cache.keys_values[..., : old.cache.slots, :] = old.cache.keys_values
            room.cache.lengths = list(old.cache.lengths)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def said_of(given: Tensor, logits: Tensor, statistics: Sequence[Tensor]) -> Said:
    """What a head said, of what guesses below take in, logits, and the first three of their row_statistics."""
    top_tokens, top_logits, log_sum_exp = (values.cpu().numpy() for values in statistics)
    return Said(given, logits, top_tokens.copy(), top_logits - log_sum_exp[:, None])
