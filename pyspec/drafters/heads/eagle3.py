"""An EAGLE-3 head: weights, and one guess a row. Li et al., arXiv 2503.01840; flags of 3.1 are those of speculators.

A row is a token x and a hidden row g that came before it: what the target's layers had for the token before x, joined
by one matrix, or where that token is a guess itself, what the head gave for it. The head says what follows x:

    h = [norm(embedding(x)), norm(g)];  s = g + attention(h);  s = s + feed_forward(norm(s));  head(norm(s))

The first layer is as wide again as the others, because it takes in two rows for one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyspec.architectures.blocks import attend, attention, feed_forward, tap
from pyspec.architectures.llama import LayerWeights
from pyspec.architectures.weights import Blank, Matrix, laid_out, move_together
from pyspec.drafters.heads.eagle3_files import Eagle3Config, read_config, read_tensors
from pyspec.ops.linear import LinearWeight, linear
from pyspec.ops.rms_norm import rms_norm
from pyspec.ops.row_statistics import row_statistics

__all__ = ["Eagle3Head"]


class Eagle3Head:
    """A head beside its target.

    Args:
        config: see Eagle3Config.
        tensors: by the names of the speculators layout.
        embed: [R, H] fp32 for tokens [R]: the target's, for heads that have none of their own; or None.
        embeds_by_op: whether that is one op of int32 tokens.
        head: the target's, for heads that have none of their own and guess all tokens; or None.
        source: what errors name.
        weights: dtype of the head's matrices: float32, bfloat16, int8 or "int4".
        dtype: of activations and of its keys and values.
        device: where it runs.

    Raises:
        ValueError: a tensor is missing, unknown, of another shape or contradicts a flag; or d2t names no token.
    """

    def __init__(
        self,
        config: Eagle3Config,
        tensors: Mapping[str, Tensor],
        embed: Callable[[Tensor], Tensor] | None,
        head: LinearWeight | None,
        *,
        embeds_by_op: bool = False,
        source: Path | str,
        weights: torch.dtype | str,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.config, self.dtype, self.device = config, dtype, device
        self.rooms: deque = deque(maxlen=2)  # of batches that are over, each a HeadRoom
        shape, width = config.layers, config.layers.hidden_size
        blank = Blank(torch.float32, device)
        self.layers = [LayerWeights.empty(shape, blank) for _ in range(shape.layers)]
        first = self.layers[0]
        first.qkv = blank.matrix(first.qkv.shape[0], 2 * width)
        joined = len(config.taps) * config.target_hidden_size
        self.hidden_norm, self.norm = blank.vector(width), blank.vector(width)
        self.join: Matrix = blank.matrix(width, joined)
        self.join_norm = None
        places = {"fc.weight": self.join, "norm.weight": self.norm, "layers.0.hidden_norm.weight": self.hidden_norm}
        if config.norm_before_fc:
            self.join_norm = places["input_norm.weight"] = blank.vector(joined)
        elif config.fc_norm:
            self.join_norm = blank.vector(len(config.taps), config.target_hidden_size)
            places |= {f"fc_norm.{index}.weight": row for index, row in enumerate(self.join_norm)}
        for index, layer in enumerate(self.layers):
            places |= layer.named(shape, f"layers.{index}.")
        self.embedding = None
        if "embed_tokens.weight" in tensors:
            self.embedding = places["embed_tokens.weight"] = blank.matrix(shape.vocab_size, width)
        self.has_head = own_head = "lm_head.weight" in tensors
        if own_head:
            places["lm_head.weight"] = blank.matrix(config.draft_vocab_size, width)
        _fill(places, {name: values for name, values in tensors.items() if name != "d2t"}, source)
        self.tokens = _tokens_of(tensors.get("d2t"), config, source)
        lacks_head = not own_head and (head is None or self.tokens is not None)
        for name, is_lacking in (("embed_tokens", self.embedding is None and embed is None), ("lm_head", lacks_head)):
            if is_lacking:
                raise ValueError(f"{source} has no {name}.weight, and the target's cannot be used in its place")
        self._embed, self.embeds_by_op = embed, embeds_by_op
        if self.embedding is not None:
            self.embedding = laid_out(self.embedding, dtype)
            self._embed, self.embeds_by_op = self.embedding.rows, self.embedding.rows_by_op
        self.head = laid_out(places["lm_head.weight"], weights) if own_head else head
        self.join = laid_out(self.join, weights)
        # of the embedding, whose product is added to that of the hidden row: rows of both are nowhere side by side
        self.embedding_qkv, first.qkv = laid_out(first.qkv[:, :width], weights), first.qkv[:, width:]
        for layer in self.layers:
            layer.lay_out(weights)
            layer.prepare(shape)
        if device.type == "cpu":
            of_layers = [(layer, name) for layer in self.layers for name in layer.MATRICES]
            move_together(
                [(self, "join"), (self, "embedding_qkv"), *of_layers, *([(self, "head")] if own_head else [])]
            )

    @property
    def vocab_size(self) -> int:
        """Tokens that it can guess."""
        return self.config.draft_vocab_size

    def described(self) -> dict[str, str]:
        """What it is and what was taken where its files leave it open, by short names, for people."""
        config, shape = self.config, self.config.layers
        flags = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
        width, heads = shape.hidden_size, f"{shape.heads} heads, {shape.kv_heads} of keys, {shape.head_dim} wide"
        found = {
            "layout": config.layout,
            "layers": f"{shape.layers}, hidden size {width}, {heads}, rope base {shape.rope_base:g}",
            "taps": f"{list(config.taps)} of the target, each what a layer takes in",
            "flags": ", ".join(name for name in flags if getattr(config, name)) or "none",
            "embedding": "its own" if self.embedding is not None else "the target's",
            "head": "its own" if self.has_head else "the target's",
            "vocabulary": f"{self.vocab_size} of the target's {shape.vocab_size} tokens",
        }
        return found | {f"choice {number}": choice for number, choice in enumerate(config.choices, start=1)}

    def target_tokens(self, tokens: np.ndarray) -> np.ndarray:
        """The target's tokens of some of the head's, int64."""
        return tokens.astype(np.int64) if self.tokens is None else self.tokens.numpy()[tokens]

    def embed(self, tokens: Tensor) -> Tensor:
        """[R, H] fp32 of the target's tokens [R]."""
        return self._embed(tokens.to(self.device))

    def joined(self, taps: Tensor) -> Tensor:
        """[R, H] fp32: the hidden rows of the target's taps [R, taps, target's hidden] fp32; a straight line of ops."""
        count, taps_of_row, width = taps.shape
        joined, epsilon = taps.view(count, -1), self.config.layers.norm_epsilon
        if self.config.fc_norm:
            joined = taps.view(-1, width)
        x = rms_norm(joined, self.join_norm, epsilon, out_dtype=self.dtype)  # without a norm they are rounded alone
        return linear(x.view(count, -1), self.join, out_dtype=torch.float32)

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
    def load(
        cls, folder: Path, target, weights: torch.dtype | str | None = None, taps: Sequence[int] | None = None
    ) -> Eagle3Head:
        """The head in a folder, for a runner; matrices in `weights`, by default int8 on a CPU and bf16 elsewhere.

        Raises:
            FileNotFoundError, ValueError: see read_tensors, read_config and Eagle3Head; or it is for another target.
        """
        tensors = read_tensors(folder)
        config = read_config(folder, {name: values.shape for name, values in tensors.items()}, target.layers, taps)
        for name, found, expected in (
            ("vocabulary", config.layers.vocab_size, target.vocab_size),
            ("hidden size", config.target_hidden_size, target.hidden_size),
        ):
            if found != expected:
                raise ValueError(f"{folder} is a head for a target with a {name} of {found}, got one of {expected}")
        weights = weights or (torch.int8 if target.device.type == "cpu" else torch.bfloat16)
        where = {"weights": weights, "dtype": target.dtype, "device": target.device}
        same_width = config.layers.hidden_size == target.hidden_size
        embed, head = (target.embed, target.head) if same_width else (None, None)
        by_op = getattr(target, "embeds_by_op", False)
        return cls(config, tensors, embed, head, embeds_by_op=by_op, source=folder, **where)


def _fill(places: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: Path | str) -> None:
    """Copies tensors to their places, once all are known to fit."""
    if missing := sorted(places.keys() - tensors.keys()):
        raise ValueError(f"{source} has no {', '.join(missing[:3])}, which its config.json asks for")
    if unknown := sorted(tensors.keys() - places.keys()):
        raise ValueError(f"{source} has {', '.join(unknown[:3])}, which contradicts its config.json")
    for name, place in places.items():
        if tensors[name].shape != place.shape:
            raise ValueError(f"{source} must have {name} {list(place.shape)}, got {list(tensors[name].shape)}")
        if not tensors[name].is_floating_point():
            raise ValueError(f"{source} must have {name} in floating point, got {tensors[name].dtype}")
        if not torch.isfinite(tensors[name].float()).all():
            raise ValueError(f"{source} has NaN or infinity in {name}")
    for name, place in places.items():
        place.copy_(tensors[name])


def _tokens_of(offsets: Tensor | None, config: Eagle3Config, source: Path | str) -> Tensor | None:
    """[draft vocabulary] int64, the target's token of each of the head's; None where they are the same."""
    size, vocabulary = config.draft_vocab_size, config.layers.vocab_size
    if offsets is None:
        if size != vocabulary:
            raise ValueError(f"{source} has no d2t, but {size} of the target's {vocabulary} tokens")
        return None
    if offsets.shape != (size,) or offsets.is_floating_point():
        raise ValueError(f"{source} must have d2t [{size}] of integers, got {offsets.dtype} {list(offsets.shape)}")
    tokens = offsets.long() + torch.arange(size)
    if tokens.min() < 0 or tokens.max() >= vocabulary or len(tokens.unique()) < size:
        raise ValueError(f"{source} has a d2t that names tokens outside of [0, {vocabulary}), or one of them twice")
    return None if size == vocabulary and not offsets.any() else tokens
