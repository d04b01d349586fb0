"""An EAGLE-3 head: weights, and one guess a row. Li et al., arXiv 2503.01840; flags of 3.1 are those of speculators.

A row is a token x and a hidden row g that came before it: what the target's layers had for the token before x, joined
by one matrix, or where that token is a guess itself, what the head gave for it. The head says what follows x:

    h = [norm(embedding(x)), norm(g)];  s = g + attention(h);  s = s + feed_forward(norm(s));  head(norm(s))

The first layer is as wide again as the others, because it takes in two rows for one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pyspec.architectures.blocks import attend, attention, feed_forward, tap
from pyspec.architectures.weights import Blank, laid_out
from pyspec.drafters.heads.eagle3_files import read_config
from pyspec.drafters.heads.trained import TrainedHead
from pyspec.ops.linear import linear
from pyspec.ops.rms_norm import rms_norm
from pyspec.ops.row_statistics import row_statistics

__all__ = ["Eagle3Head"]


class Eagle3Head(TrainedHead):
    """An EAGLE-3 head; config is an Eagle3Config, other arguments and errors are as for TrainedHead."""

    title = "an EAGLE-3 head"

    @property
    def given_width(self) -> int:
        return self.config.layers.hidden_size

    def _own_places(self, blank: Blank) -> dict[str, Tensor]:
        config, (first, *_) = self.config, self.layers
        first.qkv = blank.matrix(first.qkv.shape[0], 2 * config.layers.hidden_size)
        places = {"layers.0.hidden_norm.weight": self.hidden_norm}
        if config.norm_before_fc:
            self.join_norm = places["input_norm.weight"] = blank.vector(self.join.shape[1])
        elif config.fc_norm:
            self.join_norm = blank.vector(len(config.taps), config.target_hidden_size)
            places |= {f"fc_norm.{index}.weight": row for index, row in enumerate(self.join_norm)}
        return places

    def _lay_out_own(self, weights: torch.dtype | str) -> Sequence[str]:
        first, width = self.layers[0], self.config.layers.hidden_size
        # of the embedding, whose product is added to that of the hidden row: rows of both are nowhere side by side
        self.embedding_qkv, first.qkv = laid_out(first.qkv[:, :width], weights), first.qkv[:, width:]
        return ["embedding_qkv"]

    def _own_described(self) -> dict[str, str]:
        flags = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
        on = ", ".join(name for name in flags if getattr(self.config, name)) or "none"
        return {"layout": self.config.layout, "flags": on}

    def forward(self, embedded: Tensor, hidden: Tensor, cache, numbers) -> tuple[Tensor, Tensor]:
        """[R, H] after the last norm, and [R, H] fp32 that the next guess takes in; a straight line of ops.

        Args:
            embedded, hidden: [R, H] fp32, used up.
            cache: of keys and values, one layer for each of the head's.
            numbers: where the rows lie, a pyspec.runners.numbers.Numbers.
        """
        config, shape, epsilon = self.config, self.config.layers, self.config.layers.norm_epsilon
        first, stream = self.layers[0], hidden
        x = rms_norm(embedded, first.scales.attention, epsilon, out_dtype=self.dtype)
        projected = linear(x, self.embedding_qkv, first.qkv_bias, out_dtype=torch.float32)
        x = rms_norm(hidden, self.hidden_norm, epsilon, out_dtype=self.dtype)
        if config.norm_before_residual:
            stream = rms_norm(hidden, self.hidden_norm, epsilon)
        projected = rms_norm(projected, None, 0.0, delta=linear(x, first.qkv, out_dtype=torch.float32))  # their sum
        delta = attend(projected, first, shape, cache, 0, numbers, self.dtype)
        for index, layer in enumerate(self.layers):
            if index:
                x = rms_norm(stream, layer.scales.attention, epsilon, delta=delta, out_dtype=self.dtype)
                delta = attention(x, layer, shape, cache, index, numbers)
            x = rms_norm(stream, layer.scales.feed_forward, epsilon, delta=delta, out_dtype=self.dtype)
            delta = feed_forward(x, layer.gate_up, layer.down, shape.activation)
        normed = rms_norm(stream, self.norm, epsilon, delta=delta, out_dtype=self.dtype)
        return normed, rms_norm(stream, self.norm, epsilon) if config.norm_output else tap(stream)

    def guesses(self, normed: Tensor) -> list[Tensor]:
        """Logits [R, draft vocabulary] fp32 of what `forward` gave, then their top_tokens [R, 8] int64, top_logits
        [R, 8] fp32 and log_sum_exp [R] fp32, see row_statistics; a straight line of ops."""
        logits = linear(normed, self.head, out_dtype=torch.float32)
        return [logits, *row_statistics(logits)[:3]]

    @classmethod
    def read_config(cls, folder: Path, tensors: Mapping[str, Tensor], target, taps: Sequence[int] | None):
        return read_config(folder, {name: values.shape for name, values in tensors.items()}, target.layers, taps)
