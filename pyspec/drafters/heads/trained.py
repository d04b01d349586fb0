"""What trained heads share: a vocabulary that may be a part of the target's, and an embedding and logits that may be
the target's own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyspec.architectures.llama import LayerWeights
from pyspec.architectures.weights import Blank, Matrix, laid_out, move_together
from pyspec.drafters.heads.files import check_target, fill, read_tensors, tokens_of
from pyspec.ops.linear import LinearWeight, linear
from pyspec.ops.rms_norm import rms_norm

__all__ = ["TrainedHead"]


class TrainedHead:
    """A head of layers of Llama or Qwen3 beside its target.

    Args:
        config: has layers, a LlamaConfig; draft_vocab_size; target_hidden_size; taps; and choices, see Eagle3Config.
        tensors: by the names of the speculators layout.
        embed: [R, H] fp32 for tokens [R]: the target's, for heads that have none of their own; or None.
        head: the target's, for heads that have none of their own and guess all tokens; or None.
        embeds_by_op: whether `embed` is one op of int32 tokens.
        source: what errors name.
        weights: dtype of the head's matrices: float32, bfloat16, int8 or "int4".
        dtype: of activations and of its keys and values.
        device: where it runs.

    Raises:
        ValueError: a tensor is missing, unknown, of another shape or contradicts config.json; or d2t names no token.
    """

    title: str  #: what people call it, with its article
    given_width: int  #: of what a guess takes in beside its token

    def __init__(
        self,
        config,
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
        shape, blank = config.layers, Blank(torch.float32, device)
        width = shape.hidden_size
        self.layers = [LayerWeights.empty(shape, blank) for _ in range(shape.layers)]
        self.hidden_norm, self.norm = blank.vector(width), blank.vector(width)
        self.join: Matrix = blank.matrix(width, len(config.taps) * config.target_hidden_size)
        self.join_norm = None  # or what taps are normed by before they are joined
        places = {"fc.weight": self.join, "norm.weight": self.norm} | self._own_places(blank)
        for index, layer in enumerate(self.layers):
            places |= layer.named(shape, f"layers.{index}.")
        self.has_embedding, self.has_head = "embed_tokens.weight" in tensors, "lm_head.weight" in tensors
        if self.has_embedding:
            places["embed_tokens.weight"] = blank.matrix(shape.vocab_size, width)
        if self.has_head:
            places["lm_head.weight"] = blank.matrix(config.draft_vocab_size, width)
        fill(places, {name: values for name, values in tensors.items() if name != "d2t"}, source)
        self.tokens = tokens_of(tensors.get("d2t"), config.draft_vocab_size, shape.vocab_size, source)
        lacks_head = not self.has_head and (head is None or self.tokens is not None)
        for name, is_lacking in (("embed_tokens", not self.has_embedding and embed is None), ("lm_head", lacks_head)):
            if is_lacking:
                raise ValueError(f"{source} has no {name}.weight, and the target's cannot be used in its place")
        self._embed, self.embeds_by_op = embed, embeds_by_op
        if self.has_embedding:
            embedding = laid_out(places["embed_tokens.weight"], dtype)
            self._embed, self.embeds_by_op = embedding.rows, embedding.rows_by_op
        self.head = laid_out(places["lm_head.weight"], weights) if self.has_head else head
        self.join = laid_out(self.join, weights)
        own = self._lay_out_own(weights)
        for layer in self.layers:
            layer.lay_out(weights)
            layer.prepare(shape)
        if device.type == "cpu":
            of_layers = [(layer, name) for layer in self.layers for name in layer.MATRICES]
            names = ["join", *own]
            move_together([*((self, name) for name in names), *of_layers, *([(self, "head")] if self.has_head else [])])

    def _own_places(self, blank: Blank) -> dict[str, Tensor]:
        """Where tensors go that other kinds of heads do not have, or where they go elsewhere."""
        raise NotImplementedError  # abstract: each kind has its own

    def _lay_out_own(self, weights: torch.dtype | str) -> Sequence[str]:
        """Lays out matrices that other kinds do not have; the names of those that each call reads whole."""
        raise NotImplementedError  # abstract: each kind has its own

    @property
    def vocab_size(self) -> int:
        """Tokens that it can guess."""
        return self.config.draft_vocab_size

    def described(self) -> dict[str, str]:
        """What it is and what was taken where its files leave it open, by short names, for people."""
        config, shape = self.config, self.config.layers
        width, heads = shape.hidden_size, f"{shape.heads} heads, {shape.kv_heads} of keys, {shape.head_dim} wide"
        found = {
            "kind": self.title,
            "layers": f"{shape.layers}, hidden size {width}, {heads}, rope base {shape.rope_base:g}",
            "taps": f"{list(config.taps)} of the target, each what a layer takes in",
            **self._own_described(),
            "embedding": "its own" if self.has_embedding else "the target's",
            "head": "its own" if self.has_head else "the target's",
            "vocabulary": f"{self.vocab_size} of the target's {shape.vocab_size} tokens",
        }
        return found | {f"choice {number}": choice for number, choice in enumerate(config.choices, start=1)}

    def _own_described(self) -> dict[str, str]:
        return {}

    def target_tokens(self, tokens: np.ndarray) -> np.ndarray:
        """The target's tokens of some of the head's, int64."""
        return tokens.astype(np.int64) if self.tokens is None else self.tokens.numpy()[tokens]

    def embed(self, tokens: Tensor) -> Tensor:
        """[R, H] fp32 of the target's tokens [R]."""
        return self._embed(tokens.to(self.device))

    def joined(self, taps: Tensor) -> Tensor:
        """[R, H] fp32: the hidden rows of the target's taps [R, taps, target's hidden] fp32; a straight line of ops."""
        count, taps_of_row, width = taps.shape
        scales = self.join_norm
        joined = taps.view(count, -1) if scales is None or scales.dim() == 1 else taps.view(-1, width)
        x = rms_norm(joined, scales, self.config.layers.norm_epsilon, out_dtype=self.dtype)  # or rounded alone
        return linear(x.view(count, -1), self.join, out_dtype=torch.float32)

    @classmethod
    def read_config(cls, folder: Path, tensors: Mapping[str, Tensor], target, taps: Sequence[int] | None):
        """The head in a folder, whose tensors are there, for a runner; taps: see Eagle3."""
        raise NotImplementedError  # abstract: each kind has its own

    @classmethod
    def load(
        cls, folder: Path, target, weights: torch.dtype | str | None = None, taps: Sequence[int] | None = None
    ) -> TrainedHead:
        """The head in a folder, for a runner; matrices in `weights`, by default int8 on a CPU and bf16 elsewhere.

        Raises:
            FileNotFoundError, ValueError: see read_tensors and the kind's read_config; or it is for another target.
        """
        tensors = read_tensors(folder)
        config = cls.read_config(folder, tensors, target, taps)
        check_target(folder, config.layers, config.target_hidden_size, target)
        weights = weights or (torch.int8 if target.device.type == "cpu" else torch.bfloat16)
        where = {"weights": weights, "dtype": target.dtype, "device": target.device}
        same_width = config.layers.hidden_size == target.hidden_size
        embed, head = (target.embed, target.head) if same_width else (None, None)
        by_op = getattr(target, "embeds_by_op", False)
        return cls(config, tensors, embed, head, embeds_by_op=by_op, source=folder, **where)
