"""The sequences that a block drafter drafts for: one call says what there is to know of all their trees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyspec.drafters.heads.context_batch import ContextBatch, ContextLaws
from pyspec.drafters.heads.eagle3_batch import Asked, HeadLaws, Level, Said, said_of
from pyspec.drafters.heads.eagle3_room import GUESS
from pyspec.ops.row_statistics import row_statistics
from pyspec.runners._inference import inference
from pyspec.sampling.sampler import Sampler

__all__ = ["BlockBatch", "BlockLaws"]

LEAST = 0.04  # chance of a draft to be accepted that pays: what a node adds to a verify of some, in plain steps


class Block(NamedTuple):
    """What a head said of a block."""

    logits: Tensor  # [block, draft vocabulary] fp32
    sure: Tensor | None  # [block] fp32


class BlockLaws(ContextLaws):
    """The laws of a block drafter: below a node of a depth they are those of a slot, and of the node's token."""

    def _begin(self) -> None:
        super()._begin()
        self._chances = {-1: 1.0}  # of drafts below a node to be accepted, all the way from the root

    def goes_on(self, tokens: Sequence[int], parents: Sequence[int], nodes: Sequence[int]) -> list[bool]:
        """Whether there is a slot for guesses below each node, and one that is drawn there has a chance that pays."""
        size = self._batch.head.config.block_size
        return [self._depths[node] < size and self._chances[node] >= LEAST for node in nodes]

    def slots(self, asked: Asked) -> tuple[list[int], np.ndarray]:
        """Of the nodes that are not known yet, the slots, and the target's tokens [n] int64."""
        nodes, last = self.unread(asked), self._batch.head.config.block_size - 1
        for node in nodes:
            self._depths[node] = self._depths[asked.parents[node]] + 1
        return [min(self._depths[node], last) for node in nodes], self._targets(asked, nodes)

    def take_chances(self, asked: Asked, chances: Sequence[float]) -> None:
        """Notes how likely a draft below each of these nodes is to be accepted, if the node is."""
        for node, chance in zip(self.unread(asked), chances, strict=True):
            self._chances[node] = self._chances[asked.parents[node]] * chance


class BlockBatch(ContextBatch):
    """The texts in a block drafter's cache, see HeadBatch."""

    def __init__(self, head):
        super().__init__(head)
        self._blocks: dict[int, Block] = {}  # by sequence, below the text that was read last

    def laws(self, sequence: int, sampler: Sampler) -> HeadLaws:
        return BlockLaws(self, sequence, sampler)

    @inference
    def read(self, contexts: Mapping[int, Sequence[int]]) -> None:
        super().read(contexts)
        for sequence in contexts:
            self._blocks.pop(sequence, None)

    @inference
    def guess(self, asked: Mapping[int, tuple[HeadLaws, Asked]]) -> None:
        """Makes the laws of nodes of several trees, by sequence; blocks that are missing are read in one call."""
        if missing := [sequence for sequence in sorted(asked) if sequence not in self._blocks]:
            self._read_blocks(missing)
        rows, sure, tokens, counts = [], [], [], {}
        for sequence, (laws, nodes) in asked.items():
            slots, of_target = laws.slots(nodes)
            block, counts[sequence] = self._blocks[sequence], len(slots)
            if slots:
                rows.append(block.logits[slots])
                tokens.append(of_target)
                sure += [] if block.sure is None else [block.sure[slots]]
        if not rows:
            return
        logits, of_guess = self.head.behind(torch.from_numpy(np.concatenate(tokens)))
        said, chances = self._of(torch.cat(rows) + logits), [1.0] * len(logits)
        if sure:
            chances = torch.sigmoid(torch.cat(sure) + (0 if of_guess is None else of_guess)).tolist()
        first = 0
        for sequence, (laws, nodes) in asked.items():
            laws.take_chances(nodes, chances[first : first + counts[sequence]])
            laws.take(nodes, said, first)
            first += counts[sequence]

    @staticmethod
    def _of(logits: Tensor) -> Said:
        return said_of(logits, logits, row_statistics(logits)[:3])

    def _read_blocks(self, sequences: Sequence[int]) -> None:
        """Reads the block below each of these texts."""
        size = self.head.config.block_size
        nothing = torch.zeros(size, 0, device=self.device)
        self._make_room(max(map(self.length, sequences)) + size)
        trees = {each: self._block(self.ends[each][-1]) for each in sequences}
        found = self._room.run(GUESS, trees, dict.fromkeys(sequences, nothing))
        logits, *sure = (found.of_trees(values).clone().split(size) for values in found.taps)
        for place, each in enumerate(sequences):
            self._blocks[each] = Block(logits[place], sure[0][place][:, 0] if sure else None)

    def _block(self, token: int) -> Level:
        """A block of a text's last token and masks, in which all rows see all."""
        size = self.head.config.block_size
        tokens = np.full(size, self.head.config.mask)
        tokens[0] = token
        bits = (2**size - 1).to_bytes(4 * ((size + 31) // 32), "little")
        return Level(
            tokens,
            np.full(size, -1, np.int32),
            np.arange(size, dtype=np.int32),
            np.frombuffer(bits * size, "<i4").reshape(size, -1),
            0,
        )
