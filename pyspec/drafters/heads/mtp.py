"""The layer of a checkpoint that guesses further tokens (mtp.* of Qwen3.5 and Qwen3-Next), as a head.

A row is a token x and a hidden row g: what the target's last norm gave for the token before x, or where that token is a
guess itself, what this layer gave for it. The layer says what follows x:

    layer([norm(embedding(x)), norm(g)] joined by one matrix), normed, through the target's head

What a guess takes in is normed, as the target's rows are. All norms have the target's offset, once.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from pyspec.architectures.decoder import DecoderConfig
from pyspec.architectures.llama import scale_of
from pyspec.architectures.mixture import MixtureConfig
from pyspec.architectures.weights import Blank, laid_out
from pyspec.ops.linear import linear
from pyspec.ops.rms_norm import rms_norm
from pyspec.ops.row_statistics import row_statistics

__all__ = ["MtpConfig", "MtpHead"]

CONTEXT = 2**24  # positions: that of a head is the target's


@dataclass(frozen=True)
class MtpConfig:
    """What the layer is.

    Attributes:
        layers: the shape of the layer: the target's layers with attention.
        target_hidden_size: width of the target's residual stream.
        taps: what it reads of the target: what the last norm takes in.
    """

    layers: DecoderConfig
    target_hidden_size: int
    taps: tuple[int, ...]


class MtpHead:
    """The layer beside its target, whose embedding and head it shares.

    Args:
        target: a runner whose weights have `mtp`, see pyspec.checkpoints.weights.NextTokens.
        weights: dtype of the matrices: float32, bfloat16, int8 or "int4"; by default int8 on a CPU and bfloat16
            elsewhere.

    Raises:
        ValueError: the target's checkpoint has no such layer, or more than one; or a tensor is missing, unknown, of
            another shape, or holds NaN or infinity.
    """

    def __init__(self, target, weights: torch.dtype | str | None = None):
        stored = getattr(getattr(target, "weights", None), "mtp", None)
        if stored is None:
            raise ValueError(
                f"target must be of a checkpoint with a layer that guesses further tokens (mtp.*), got a "
                f"{type(target).__name__} without one"
            )
        self.dtype, self.device, self.vocab_size = target.dtype, target.device, target.vocab_size
        shape, hidden = _shape_of_layer(target.config), target.hidden_size
        self.config = MtpConfig(shape, hidden, (target.layers,))
        blank = Blank(torch.float32, self.device)
        (self.layer,) = shape.empty_layers(blank)
        norms = {name: blank.vector(hidden) for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")}
        join = blank.matrix(hidden, 2 * hidden)
        places = {f"{name}.weight": norm for name, norm in norms.items()} | {"fc.weight": join}
        stored.fill(places | self.layer.named(shape, "layers.0."))
        weights = weights or (torch.int8 if self.device.type == "cpu" else torch.bfloat16)
        self.layer.lay_out(weights)
        self.layer.prepare(shape)
        self._join = [laid_out(half, weights) for half in join.split(hidden, 1)]  # rows are nowhere side by side
        *self._pair_norms, self._norm = (scale_of(norm, shape) for norm in norms.values())
        self._target_norm = target.weights.last_scale
        self._embed, self.embeds_by_op, self._logits = target.embed, target.embeds_by_op, target.head
        self.tokens, self.rooms, self.given_width = None, deque(maxlen=2), hidden  # see TrainedHead

    def target_tokens(self, tokens: np.ndarray) -> np.ndarray:
        """The target's tokens of some of the head's, int64: the same."""
        return tokens.astype(np.int64)

    def embed(self, tokens: Tensor) -> Tensor:
        """[R, H] fp32 of the target's tokens [R]."""
        return self._embed(tokens.to(self.device))

    def joined(self, taps: Tensor) -> Tensor:
        """[R, H] fp32: the hidden rows of the target's taps [R, 1, H] fp32; a straight line of ops."""
        return rms_norm(taps.view(len(taps), -1), self._target_norm, self.config.layers.norm_epsilon)

    def forward(self, embedded: Tensor, hidden: Tensor, cache, numbers) -> tuple[Tensor, Tensor]:
        """[R, H] after the last norm, and the same in fp32, which the next guess takes in; a straight line of ops.

        Args:
            embedded, hidden: [R, H] fp32.
            cache: of keys and values, of one layer.
            numbers: where the rows lie, a pyspec.runners.numbers.Numbers.
        """
        layer, shape, epsilon = self.layer, self.config.layers, self.config.layers.norm_epsilon
        parts = [
            linear(rms_norm(rows, norm, epsilon, out_dtype=self.dtype), join, out_dtype=torch.float32)
            for rows, norm, join in zip((embedded, hidden), self._pair_norms, self._join, strict=True)
        ]
        stream = rms_norm(parts[0], None, 0.0, delta=parts[1])  # their sum
        x = rms_norm(stream, layer.scales.attention, epsilon, out_dtype=self.dtype)
        delta = layer.mix(x, shape, cache, 0, numbers)
        x = rms_norm(stream, layer.scales.feed_forward, epsilon, delta=delta, out_dtype=self.dtype)
        delta = layer.feed_forward(x, shape)
        normed = rms_norm(stream, self._norm, epsilon, delta=delta, out_dtype=self.dtype)
        return normed, rms_norm(stream, self._norm, epsilon)

    def guesses(self, normed: Tensor) -> list[Tensor]:
        """Logits [R, V] fp32 of what `forward` gave and what is best of them, see Eagle3Head.guesses."""
        logits = linear(normed, self._logits, out_dtype=torch.float32)
        return [logits, *row_statistics(logits)[:3]]


def _shape_of_layer(config) -> DecoderConfig:
    """The shape of one layer with attention, and with experts where the target has them."""
    kind = MixtureConfig if isinstance(config, MixtureConfig) else DecoderConfig
    shape = {field.name: getattr(config, field.name) for field in fields(kind)}
    shape |= {"layers": 1, "windows": (), "turns": (), "context_length": CONTEXT, "tied_embedding": False}
    return kind(**shape | ({"expert_layers": ()} if kind is MixtureConfig else {}))
