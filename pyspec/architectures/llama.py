"""Llama-shaped models (Llama, SmolLM2, Mistral, Qwen2): their shape, their weights and their checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pyspec.architectures import FAMILIES, GGUF, Family, Unsupported
from pyspec.architectures.blocks import attention, feed_forward, tap
from pyspec.architectures.rotary import Rope, RopeScaling, read_rope, rope_frequencies, rope_table
from pyspec.architectures.shapes import (
    DEFAULTS,
    GGUF_TENSORS,
    interleaved_rows,
    read_activation,
    read_gguf_shape,
    read_kinds,
    read_shape,
)
from pyspec.architectures.weights import Blank, Matrix, NativeLayer, NativeWeights, dense
from pyspec.entries import Entries
from pyspec.ops.rms_norm import rms_norm
from pyspec.ops.tree_attention import TREE_HEAD_DIMS
from pyspec.runners.attention import AttentionRunner

if TYPE_CHECKING:
    from pyspec.checkpoints.gguf import GGUFFile

__all__ = ["DecoderLayer", "LayerWeights", "LlamaConfig", "LlamaWeights", "Scales", "read_qwen_windows", "scale_of"]


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a model. windows holds each layer's sliding window in positions, None for full attention.

    What other families have beside, they have as fields of a DecoderConfig; here it has one value for all.
    """

    # what `norms` of a layer are called in checkpoints; a layer has no others
    norm_names = {"attention": "input_layernorm", "feed_forward": "post_attention_layernorm"}  # noqa: RUF012
    fused = ()  # matrices that checkpoints have as one already: qkv, gate_up
    activation = "silu"
    head_norm = None
    norm_offset = 0.0
    embedding_scale = logits_scale = 1.0
    logits_softcap = attention_scale = attention_softcap = rope_width = None
    centred = norm_bias = is_parallel = has_sinks = norms_values = is_gated = False
    is_chunked = False  # whether windows begin at multiples of their length instead of sliding
    layer_heads = None  # of each layer, key heads and their width, where layers differ
    key_layers = None  # of each layer, the one whose keys it reads, where that is not always its own

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
        if self.head_dim not in TREE_HEAD_DIMS:
            raise Unsupported(f"head_dim {self.head_dim} of {self.architecture}: supported are {TREE_HEAD_DIMS}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}")

    @property
    def inner_parts(self) -> tuple[str, ...]:
        """The matrices that give the inner rows of a feed-forward part: relu2 has no gates."""
        return ("up",) if self.activation == "relu2" else ("gate", "up")

    @property
    def places(self) -> Sequence[int]:
        """Of each layer, its place among those that have the same kind of cache."""
        return range(self.layers)

    def empty_layers(self, blank: Blank) -> list[DecoderLayer]:
        return [LayerWeights.empty(self, blank) for _ in range(self.layers)]

    def rope_frequencies(self) -> Tensor:
        """Radians per position, fp32, of half the dimensions of a head that are turned."""
        return rope_frequencies(self.rope_base, self.rope_width or self.head_dim, self.rope_scaling)

    def ropes(self, positions: int, device: torch.device) -> list[Rope]:
        """What each layer's heads are turned by at so many positions; some layers share it.

        With a switch (RopeScaling.switch) those of longer texts lie behind those of the others.
        """
        scaling = self.rope_scaling
        magnitude = 1.0 if scaling is None else scaling.magnitude
        table = rope_table(self.rope_frequencies(), positions, device, magnitude)
        if self.rope_switch is not None:
            plain = rope_frequencies(self.rope_base, self.rope_width or self.head_dim, None)
            table = torch.cat((table, rope_table(scaling.scaled_long(plain), positions, device, magnitude)))
        return [Rope(table)] * self.layers

    @property
    def rope_switch(self) -> int | None:
        """Tokens of a text from which on other frequencies take the place of all; None if that is never so."""
        return None if self.rope_scaling is None else self.rope_scaling.switch


@dataclass
class DecoderLayer(NativeLayer):
    """What all layers have beside what mixes rows, which is `mix`: norms and a feed-forward part, whose gate and up are
    one matrix, or which has no gate.

    A part of a layer, attention or feed_forward, may norm what it takes in, what it gives (attention_output,
    feed_forward_output), or both. After `prepare`, `scales` has what rms_norm multiplies by, None where there is no
    such norm.
    """

    MATRICES = ("gate_up", "down")
    NORMS = None  # as LlamaConfig.norm_names, where a kind of layers has others

    norms: dict[str, Tensor]  # [hidden] each, by the names of LlamaConfig.norm_names
    norm_biases: dict[str, Tensor]  # by the same names; or none
    gate_up: Matrix  # [2 * intermediate, hidden]
    down: Matrix  # [hidden, intermediate]

    @classmethod
    def empty_parts(cls, config: LlamaConfig, blank: Blank) -> dict[str, Any]:
        """The fields that all layers have."""
        names = cls.NORMS or config.norm_names
        return {
            "norms": {name: blank.vector(config.hidden_size) for name in names},
            "norm_biases": {name: blank.vector(config.hidden_size) for name in names if config.norm_bias},
        } | cls.empty_feed_forward(config, blank)

    @classmethod
    def empty_feed_forward(cls, config: LlamaConfig, blank: Blank) -> dict[str, Tensor]:
        return {
            "gate_up": blank.matrix(len(config.inner_parts) * config.intermediate_size, config.hidden_size),
            "down": blank.matrix(config.hidden_size, config.intermediate_size),
        }

    def named_norms(self, config: LlamaConfig) -> dict[str, Tensor]:
        names = self.NORMS or config.norm_names
        tensors = {f"{names[name]}.weight": norm for name, norm in self.norms.items()}
        return tensors | {f"{names[name]}.bias": bias for name, bias in self.norm_biases.items()}

    def named_feed_forward(self, config: LlamaConfig) -> dict[str, Tensor]:
        tensors = {"down_proj": dense(self.down)}
        if "gate_up" in config.fused:
            return tensors | {"gate_up_proj": dense(self.gate_up)}
        parts = zip(config.inner_parts, dense(self.gate_up).split(config.intermediate_size), strict=True)
        return tensors | {f"{name}_proj": part for name, part in parts}

    def mix(self, x: Tensor, config: LlamaConfig, cache, place: int, numbers) -> Tensor:
        """[R, H] fp32: what the layer adds to normed rows x [R, H]; place: see LlamaConfig.places."""
        raise NotImplementedError  # abstract: attention, or a recurrence

    def feed_forward(self, x: Tensor, config: LlamaConfig) -> Tensor:
        return feed_forward(x, self.gate_up, self.down, config.activation)

    def prepare(self, config: LlamaConfig) -> None:
        if hasattr(self, "scales"):  # another runner shares the weights
            return
        self.scales = Scales(**{name: scale_of(norm, config) for name, norm in self.norms.items()})
        self.shifts = Scales(**self.norm_biases)
        self.compute(config)

    def compute(self, config: LlamaConfig) -> None:
        """What `prepare` works out beside norms."""


@dataclass
class LayerWeights(DecoderLayer):
    """A layer with attention. Queries, keys and values are one matrix, in which gates come before them where the
    config is gated. After `prepare`, `head_scales` has what rotary_write multiplies by.
    """

    MATRICES = ("qkv", "output", *DecoderLayer.MATRICES)
    has_keys = True  # else a layer reads those of another, and qkv is of queries alone

    head_norms: dict[str, Tensor]  # of queries, q_norm, and of keys, k_norm: [head_dim], or of all heads; or none
    qkv: Matrix  # [(gates, as many as heads, + heads + 2 kv_heads) * head_dim, hidden]
    qkv_bias: Tensor | None
    output: Matrix  # [hidden, heads * head_dim]
    output_bias: Tensor | None
    sinks: Tensor | None  # [heads]

    @classmethod
    def empty(cls, config: LlamaConfig, blank: Blank) -> LayerWeights:
        heads = config.heads * (1 + config.is_gated) + 2 * config.kv_heads * cls.has_keys
        qkv_rows = heads * config.head_dim
        normed = {None: (), "head": (1, 1), "row": (config.heads, config.kv_heads)}[config.head_norm]
        return cls(
            head_norms={
                name: blank.vector(heads * config.head_dim)
                for name, heads in zip(("q_norm", "k_norm")[: 1 + cls.has_keys], normed, strict=False)
            },
            qkv=blank.matrix(qkv_rows, config.hidden_size),
            qkv_bias=blank.vector(qkv_rows) if config.qkv_bias else None,
            output=blank.matrix(config.hidden_size, config.heads * config.head_dim),
            output_bias=blank.vector(config.hidden_size) if config.output_bias else None,
            sinks=blank.vector(config.heads) if config.has_sinks else None,
            **cls.empty_parts(config, blank),
        )

    def named(self, config: LlamaConfig, prefix: str) -> dict[str, Tensor]:
        kv_rows = config.kv_heads * config.head_dim
        qkv_rows = [config.heads * (1 + config.is_gated) * config.head_dim, kv_rows, kv_rows]
        tensors = self.named_norms(config)
        if self.sinks is not None:
            tensors["self_attn.sinks"] = self.sinks
        tensors["self_attn.o_proj.weight"] = dense(self.output)
        feed_forward = {f"mlp.{name}.weight": tensor for name, tensor in self.named_feed_forward(config).items()}
        tensors |= dict([*feed_forward.items()][:1])  # down: fingerprints of models hang on the order
        joined, parts = (("qkv",), [sum(qkv_rows)]) if "qkv" in config.fused else ("qkv", qkv_rows)
        if not self.has_keys:
            joined, parts = "q", qkv_rows[:1]
        for name, part in zip(joined, dense(self.qkv).split(parts), strict=True):
            tensors[f"self_attn.{name}_proj.weight"] = part
        if self.qkv_bias is not None:
            for name, part in zip(joined, self.qkv_bias.split(parts), strict=True):
                tensors[f"self_attn.{name}_proj.bias"] = part
        if self.output_bias is not None:
            tensors["self_attn.o_proj.bias"] = self.output_bias
        tensors |= feed_forward
        tensors |= {f"self_attn.{name}.weight": norm for name, norm in self.head_norms.items()}
        return {prefix + name: tensor for name, tensor in tensors.items()}

    def mix(self, x: Tensor, config: LlamaConfig, cache, place: int, numbers) -> Tensor:
        return attention(x, self, config, cache, place, numbers)

    def compute(self, config: LlamaConfig) -> None:
        self.head_scales = None
        if self.head_norms:
            norms = list(self.head_norms.values())  # a key that there is none of has its norm too
            scales = scale_of(torch.cat(norms if self.has_keys else 2 * norms), config)
            self.head_scales = scales.view(-1, config.head_dim)


class Scales(NamedTuple):
    """What the norms of a layer multiply by, or add, [hidden] fp32; None for those that it does not have."""

    attention: Tensor | None = None
    attention_output: Tensor | None = None
    feed_forward: Tensor | None = None
    feed_forward_output: Tensor | None = None


def scale_of(norm: Tensor, config: LlamaConfig) -> Tensor:
    """What a norm multiplies by, where checkpoints may have that less an offset."""
    return norm + config.norm_offset if config.norm_offset else norm


@dataclass
class LlamaWeights(NativeWeights):
    """All weights, by the names of Hugging Face's Llama."""

    norm_bias: Tensor | None = None  # of the last norm, [hidden]

    @classmethod
    def empty(
        cls, config: LlamaConfig, dtype: torch.dtype, device: torch.device, matrices: torch.device | None = None
    ) -> LlamaWeights:
        weights = super().empty(config, dtype, device, matrices)
        if config.norm_bias:
            weights.norm_bias = Blank(dtype, device).vector(config.hidden_size)
        return weights

    def named_outside(self, config: LlamaConfig) -> dict[str, Tensor]:
        tensors = super().named_outside(config)
        return tensors if self.norm_bias is None else tensors | {"model.norm.bias": self.norm_bias}

    def forward(self, config: LlamaConfig, hidden: Tensor, cache, numbers, dtype, layers=None, taps=()) -> list[Tensor]:
        delta = delta_scale = None
        tapped = []

        def norm(scale: Tensor | None, bias: Tensor | None) -> Tensor:
            """Takes in what the last part of a layer gave."""
            change = {"delta": delta, "delta_weight": delta_scale, "bias": bias, "centred": config.centred}
            return rms_norm(hidden, scale, config.norm_epsilon, out_dtype=dtype, **change)

        for index in range(config.layers) if layers is None else layers:
            layer = self.layers[index]
            scales, shifts = layer.scales, layer.shifts
            x = norm(scales.attention, shifts.attention)
            if index in taps:
                tapped.append(tap(hidden))
            delta, delta_scale = layer.mix(x, config, cache, config.places[index], numbers), scales.attention_output
            if config.is_parallel:
                rms_norm(hidden, None, config.norm_epsilon, delta=delta)
            else:
                x = norm(scales.feed_forward, shifts.feed_forward)
            delta, delta_scale = layer.feed_forward(x, config), scales.feed_forward_output
        normed = norm(self.last_scale, self.last_shift)
        return [normed, *tapped, *([tap(hidden)] if config.layers in taps else [])]

    def prepare(self, config: LlamaConfig) -> None:
        super().prepare(config)
        if not hasattr(self, "last_scale"):
            scale = scale_of(self.norm, config)
            self.last_scale = scale if config.logits_scale == 1 else scale * config.logits_scale
            shift = self.norm_bias
            self.last_shift = shift if shift is None or config.logits_scale == 1 else shift * config.logits_scale

    def embeds_by_op(self, config: LlamaConfig) -> bool:
        return config.embedding_scale == 1 and super().embeds_by_op(config)

    def embed(self, config: LlamaConfig, tokens: Tensor) -> Tensor:
        rows = super().embed(config, tokens)
        return rows if config.embedding_scale == 1 else rows * config.embedding_scale

    def logits(self, config: LlamaConfig, hidden: Tensor) -> Tensor:
        logits = super().logits(config, hidden)
        if (cap := config.logits_softcap) is not None:
            logits = logits.div_(cap).tanh_().mul_(cap)
        return logits


# ==== config.json ====

_SHARED = DEFAULTS | {"rms_norm_eps": 1e-6}
_LLAMA = _SHARED | {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048}
_MISTRAL = _SHARED | {"vocab_size": 32000, "intermediate_size": 14336, "max_position_embeddings": 131072}
_MISTRAL |= {"num_key_value_heads": 8, "sliding_window": 4096}
_QWEN2 = _SHARED | {"vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768}
_QWEN2 |= {"num_key_value_heads": 32, "sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28}


def _read(source: Path | str, entries: Entries, architecture: str) -> LlamaConfig:
    if read_activation(source, entries) != "silu":
        raise Unsupported(f"{source} has hidden_act {entries.get('hidden_act')!r}, Llama's kernels have silu")
    shape = read_shape(source, entries, architecture)
    theta, scaling = read_rope(source, entries)
    has_output_bias = architecture == "LlamaForCausalLM" and entries.flag("attention_bias")
    return LlamaConfig(
        **shape,
        rope_base=theta,
        rope_scaling=scaling,
        windows=_windows(architecture, entries, shape["layers"]),
        qkv_bias=architecture == "Qwen2ForCausalLM" or has_output_bias,
        output_bias=has_output_bias,
    )


def _windows(architecture: str, entries: Entries, layers: int) -> tuple[int | None, ...]:
    """Each layer's window: null is none, left out the class's."""
    if architecture == "LlamaForCausalLM" or entries.is_null("sliding_window"):
        return (None,) * layers
    if architecture == "Qwen2ForCausalLM":
        return read_qwen_windows(entries, layers)
    return (entries.whole("sliding_window", least=0) or None,) * layers


def read_qwen_windows(entries: Entries, layers: int) -> tuple[int | None, ...]:
    """The windows of Qwen2 and Qwen3: by layer_types, or in all layers from one on, where they are in use at all."""
    window = None
    if not entries.is_null("sliding_window") and entries.flag("use_sliding_window"):
        window = entries.whole("sliding_window", least=0) or None
    first = entries.whole("max_window_layers", least=0)
    kinds = read_kinds(entries, layers, lambda layer: layer >= first, has_window=window is not None)
    return tuple(window if is_local else None for is_local in kinds)


# ==== GGUF ====


def _read_gguf(file: GGUFFile, entries: Entries) -> LlamaConfig:
    """The shape of the model in a GGUF file, as llama.cpp reads it."""
    shape = read_gguf_shape(file, entries)
    if entries.whole("rope.dimension_count", shape["head_dim"]) != shape["head_dim"]:
        raise Unsupported(f"{file.path} rotates only part of each head, which is not supported")
    window = entries.whole("attention.sliding_window", 0, least=0) or None
    return LlamaConfig(**shape, windows=(window,) * shape["layers"])


def _row_order(config: LlamaConfig, name: str, rows: int) -> Tensor | None:
    return interleaved_rows(config, name, rows) if config.architecture == "llama" else None


_ARCHITECTURES = {"LlamaForCausalLM": _LLAMA, "MistralForCausalLM": _MISTRAL, "Qwen2ForCausalLM": _QWEN2}
_GGUF = GGUF(("llama", "mistral", "qwen2"), _read_gguf, GGUF_TENSORS, _row_order)
_FAMILY = Family(_ARCHITECTURES, _read, LlamaWeights, AttentionRunner, _GGUF)
FAMILIES.register("llama", _FAMILY, "Llama 2 and 3, SmolLM2, Mistral, Qwen2")
