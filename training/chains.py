"""Attention of chains of guesses to the texts that they begin in, all chains of a batch at once.

A chain that begins at row t sees the rows of its text up to t, whose keys are made of what the target said, and its own
guesses before, which no other chain sees. Scores against the text are one product for all chains of a depth; scores
against a chain's own guesses are one sum a row. So depth d costs what the first does and d sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from training.data_files import Batch

__all__ = ["ChainAttention", "turned"]


def turned(rows: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """[..., heads, head_dim] fp32: rows of heads turned by their positions [...]; frequencies: [head_dim / 2]."""
    angles = positions[..., None, None] * frequencies
    cosines, sines = angles.cos(), angles.sin()
    first, second = rows.float().chunk(2, -1)
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines], -1)


class ChainAttention:
    """Keys and values of a batch's texts and of the chains in them.

    Args:
        batch: the texts.
        config: shape of the heads and what turns them, a LlamaConfig.
    """

    def __init__(self, batch: Batch, config):
        self._positions, texts = batch.positions, int(batch.texts[-1]) + 1
        self._kv_heads, self._head_dim = config.kv_heads, config.head_dim
        self._length = int(batch.positions.max()) + 1
        self._padded = (texts, self._length)
        self._slots = batch.texts * self._length + batch.positions
        self._frequencies = config.rope_frequencies()
        hidden = torch.ones(self._length, self._length, dtype=torch.bool).triu(1)
        self._mask = torch.zeros(hidden.shape).masked_fill(hidden, float("-inf"))
        self._guessed: list[tuple[Tensor, Tensor]] = []  # by depth, keys and values [chains, kv_heads, head_dim]

    def read(self, keys: Tensor, values: Tensor) -> None:
        """Takes in the keys and values [n, kv_heads * head_dim] of all rows of the texts."""
        turned = self._turned(keys, self._positions)
        self._keys, self._values = (
            self._spread(rows, self._slots).transpose(1, 2).flatten(0, 1) for rows in (turned, self._in_heads(values))
        )  # [texts * kv_heads, length, head_dim]

    def guess(self, goes_on: Tensor, chains: Tensor, keys: Tensor, values: Tensor) -> None:
        """Takes in those of one more guess of each chain that goes on.

        Args:
            goes_on: [C] bool, which of the chains before do.
            chains: [C'] int64, the rows that they begin at.
        """
        self._guessed = [(old_keys[goes_on], old_values[goes_on]) for old_keys, old_values in self._guessed]
        positions = self._positions[chains] + len(self._guessed) + 1
        self._guessed.append((self._turned(keys, positions), self._in_heads(values)))

    def mix(self, queries: Tensor, chains: Tensor) -> Tensor:
        """[C, heads * head_dim] of the queries of each chain's last guess, or where there is none of its first row."""
        slots, length = self._slots[chains], self._length
        turned = self._turned(queries, self._positions[chains] + len(self._guessed)) * self._head_dim**-0.5
        turned = turned.unflatten(1, (self._kv_heads, -1))  # [C, kv_heads, group, head_dim]
        group = turned.shape[2]
        mask = self._mask.repeat(group, 1)[None]
        scores = torch.baddbmm(mask, self._by_head(turned, slots), self._keys.transpose(1, 2))
        if self._guessed:
            own = torch.stack([(turned * keys[:, :, None]).sum(-1) for keys, _ in self._guessed], -1)
            scores = torch.cat([scores, self._by_head(own, slots).to(scores.dtype)], -1)
        shares = scores.softmax(-1)
        mixed = self._by_row(shares[..., :length] @ self._values, group, slots).float()
        own = self._by_row(shares[..., length:], group, slots).float()
        for depth, (_, values) in enumerate(self._guessed):
            mixed = mixed + own[..., depth, None] * values[:, :, None]
        return mixed.flatten(1)

    def _by_head(self, rows: Tensor, slots: Tensor) -> Tensor:
        """[texts * kv_heads, group * length, D] of rows [C, kv_heads, group, D]."""
        return self._spread(rows, slots).permute(0, 2, 3, 1, 4).flatten(2, 3).flatten(0, 1)

    def _by_row(self, rows: Tensor, group: int, slots: Tensor) -> Tensor:
        """The reverse of _by_head."""
        rows = rows.reshape(self._padded[0], self._kv_heads, group, self._length, rows.shape[-1])
        return rows.permute(0, 3, 1, 2, 4).flatten(0, 1)[slots]

    def _in_heads(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (-1, self._head_dim))

    def _turned(self, rows: Tensor, positions: Tensor) -> Tensor:
        return turned(self._in_heads(rows), positions, self._frequencies)

    def _spread(self, rows: Tensor, slots: Tensor) -> Tensor:
        """[texts, length, ...]: rows at their places, 0 elsewhere."""
        texts, length = self._padded
        spread = rows.new_zeros(texts * length, *rows.shape[1:])
        return spread.index_copy(0, slots, rows).unflatten(0, (texts, length))
