"""The shape and the weights of Llama-shaped models (Llama, SmolLM2, Mistral, Qwen2), by the names of Hugging Face."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyspec.architectures.blocks import attention, feed_forward
from pyspec.architectures.weights import Blank, Matrix, NativeLayer, NativeWeights, dense
from pyspec.ops.rms_norm import rms_norm
from pyspec.ops.tree_attention import HEAD_DIMS

__all__ = ["LayerWeights", "LlamaConfig", "LlamaWeights", "RopeScaling", "Unsupported", "rope_table"]


class Unsupported(ValueError):
    """A model of the family with a feature that AttentionRunner does not have."""


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context of the first training.

    "linear" divides all of them by factor; "llama3" leaves wavelengths below original_context / high_factor,
    divides those above original_context / low_factor and blends between; "table" divides each by its own and by factor.
    """

    kind: str
    factor: float = 1.0
    low_factor: float = 1.0
    high_factor: float = 4.0
    original_context: int = 8192
    table: tuple[float, ...] = ()


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a model. windows holds each layer's sliding window in positions, None for full attention."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context_length: int
    norm_epsilon: float
    rope_base: float
    rope_scaling: RopeScaling | None = None
    windows: tuple[int | None, ...] = ()
    qkv_bias: bool = False
    output_bias: bool = False
    tied_embedding: bool = False

    def __post_init__(self):
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.layers)
        for name in ("vocab_size", "hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "context_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.head_dim not in HEAD_DIMS:
            raise Unsupported(f"head_dim {self.head_dim} of {self.architecture}: supported are {HEAD_DIMS}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}")

    def empty_layers(self, blank: Blank) -> list[LayerWeights]:
        return [LayerWeights.empty(self, blank) for _ in range(self.layers)]

    def rope_frequencies(self) -> Tensor:
        """[head_dim / 2] fp32: radians per position."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.int64, device="cpu").float() / self.head_dim
        frequencies = 1.0 / self.rope_base**exponents
        scaling = self.rope_scaling
        if scaling is None:
            return frequencies
        if scaling.kind == "table":
            return frequencies / torch.tensor(scaling.table, dtype=torch.float32, device="cpu") / scaling.factor
        if scaling.kind == "linear":
            return frequencies / scaling.factor
        wavelengths = 2 * math.pi / frequencies
        kept = (scaling.original_context / wavelengths - scaling.low_factor) / (
            scaling.high_factor - scaling.low_factor
        )
        kept = kept.clamp(0, 1)
        return kept * frequencies + (1 - kept) * frequencies / scaling.factor


@dataclass
class LayerWeights(NativeLayer):
    """One layer. Queries, keys and values are one matrix, and so are gate and up; `pack` packs the matrices."""

    MATRICES = ("qkv", "output", "gate_up", "down")

    attention_norm: Tensor  # [hidden]
    qkv: Matrix  # [(heads + 2 kv_heads) * head_dim, hidden]
    qkv_bias: Tensor | None
    output: Matrix  # [hidden, heads * head_dim]
    output_bias: Tensor | None
    feed_forward_norm: Tensor  # [hidden]
    gate_up: Matrix  # [2 * intermediate, hidden]
    down: Matrix  # [hidden, intermediate]

    @classmethod
    def empty(cls, config: LlamaConfig, blank: Blank) -> LayerWeights:
        qkv_rows = (config.heads + 2 * config.kv_heads) * config.head_dim
        return cls(
            attention_norm=blank.vector(config.hidden_size),
            qkv=blank.matrix(qkv_rows, config.hidden_size),
            qkv_bias=blank.vector(qkv_rows) if config.qkv_bias else None,
            output=blank.matrix(config.hidden_size, config.heads * config.head_dim),
            output_bias=blank.vector(config.hidden_size) if config.output_bias else None,
            feed_forward_norm=blank.vector(config.hidden_size),
            gate_up=blank.matrix(2 * config.intermediate_size, config.hidden_size),
            down=blank.matrix(config.hidden_size, config.intermediate_size),
        )

    def named(self, config: LlamaConfig, prefix: str) -> dict[str, Tensor]:
        kv_rows = config.kv_heads * config.head_dim
        qkv_rows = [config.heads * config.head_dim, kv_rows, kv_rows]
        tensors = {
            prefix + "input_layernorm.weight": self.attention_norm,
            prefix + "post_attention_layernorm.weight": self.feed_forward_norm,
            prefix + "self_attn.o_proj.weight": dense(self.output),
            prefix + "mlp.down_proj.weight": dense(self.down),
        }
        for name, part in zip("qkv", dense(self.qkv).split(qkv_rows), strict=True):
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = part
        if self.qkv_bias is not None:
            for name, part in zip("qkv", self.qkv_bias.split(qkv_rows), strict=True):
                tensors[f"{prefix}self_attn.{name}_proj.bias"] = part
        if self.output_bias is not None:
            tensors[prefix + "self_attn.o_proj.bias"] = self.output_bias
        for name, part in zip(("gate", "up"), dense(self.gate_up).split(config.intermediate_size), strict=True):
            tensors[f"{prefix}mlp.{name}_proj.weight"] = part
        return tensors


class LlamaWeights(NativeWeights):
    """All weights, by the names of Hugging Face's Llama."""

    def forward(self, config: LlamaConfig, hidden: Tensor, cache, numbers, dtype, layers=None) -> Tensor:
        delta = None
        for index in range(config.layers) if layers is None else layers:
            layer, window = self.layers[index], config.windows[index]
            x = rms_norm(hidden, layer.attention_norm, config.norm_epsilon, delta=delta, out_dtype=dtype)
            delta = attention(x, layer, config.heads, cache, index, numbers, window)
            x = rms_norm(hidden, layer.feed_forward_norm, config.norm_epsilon, delta=delta, out_dtype=dtype)
            delta = feed_forward(x, layer)
        return rms_norm(hidden, self.norm, config.norm_epsilon, delta=delta, out_dtype=dtype)


def rope_table(frequencies: Tensor, positions: int, device: torch.device) -> Tensor:
    """[positions, 2, head_dim / 2] fp32: cosines and sines, as rotary_write takes them."""
    angles = torch.arange(positions, dtype=torch.float32, device="cpu")[:, None] * frequencies
    return torch.stack((angles.cos(), angles.sin()), 1).to(device)
