"""Llama-shaped models (Llama, SmolLM2, Mistral, Qwen2): their shape, their weights and their checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyspec.architectures import FAMILIES, GGUF, Family, Unsupported
from pyspec.architectures.blocks import attention, feed_forward
from pyspec.architectures.rotary import RopeScaling, read_gguf_scaling, read_rope
from pyspec.architectures.weights import Blank, Matrix, NativeLayer, NativeWeights, dense
from pyspec.entries import Entries
from pyspec.ops.rms_norm import rms_norm
from pyspec.ops.tree_attention import HEAD_DIMS
from pyspec.runners.attention import AttentionRunner

if TYPE_CHECKING:
    from pyspec.checkpoints.gguf import GGUFFile

__all__ = ["SHARED_DEFAULTS", "LayerWeights", "LlamaConfig", "LlamaWeights", "read_heads"]


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
        """Radians per position, [head_dim / 2] fp32."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.int64, device="cpu").float() / self.head_dim
        frequencies = 1.0 / self.rope_base**exponents
        return frequencies if self.rope_scaling is None else self.rope_scaling.scaled(frequencies)


@dataclass
class LayerWeights(NativeLayer):
    """One layer. Queries, keys and values are one matrix, and so are gate and up; `lay_out` lays out the matrices."""

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


# ==== config.json ====

SHARED_DEFAULTS = {"num_attention_heads": 32, "hidden_size": 4096, "num_hidden_layers": 32, "hidden_act": "silu"}
SHARED_DEFAULTS |= {"tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False}
_SHARED = SHARED_DEFAULTS | {"rms_norm_eps": 1e-6}
_LLAMA = _SHARED | {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048}
_MISTRAL = _SHARED | {"vocab_size": 32000, "intermediate_size": 14336, "max_position_embeddings": 131072}
_MISTRAL |= {"num_key_value_heads": 8, "sliding_window": 4096}
_QWEN2 = _SHARED | {"vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768}
_QWEN2 |= {"num_key_value_heads": 32, "sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28}


def _read(source: Path | str, entries: Entries, architecture: str) -> LlamaConfig:
    if entries.text("hidden_act") not in ("silu", "swish"):
        raise Unsupported(f"{source} has hidden_act {entries.get('hidden_act')!r}, AttentionRunner has silu")
    if architecture == "LlamaForCausalLM" and entries.flag("mlp_bias"):
        raise Unsupported(f"{source} has mlp_bias, which AttentionRunner does not have")
    if entries.get("quantization_config"):
        raise Unsupported(f"{source} has quantization_config, which AttentionRunner does not have")
    heads, kv_heads, head_dim = read_heads(entries)
    layers = entries.whole("num_hidden_layers")
    theta, scaling = read_rope(source, entries)
    has_output_bias = architecture == "LlamaForCausalLM" and entries.flag("attention_bias")
    return LlamaConfig(
        architecture=entries.text("model_type", architecture.removesuffix("ForCausalLM").lower()),
        vocab_size=entries.whole("vocab_size"),
        hidden_size=entries.whole("hidden_size"),
        intermediate_size=entries.whole("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        context_length=entries.whole("max_position_embeddings"),
        norm_epsilon=entries.number("rms_norm_eps"),
        rope_base=theta,
        rope_scaling=scaling,
        windows=_windows(architecture, entries, layers),
        qkv_bias=architecture == "Qwen2ForCausalLM" or has_output_bias,
        output_bias=has_output_bias,
        tied_embedding=entries.flag("tie_word_embeddings"),
    )


def read_heads(entries: Entries) -> tuple[int, int, int]:
    """Query heads, key heads and the width of a head. null key heads are the query heads, left out the class's."""
    heads, hidden = entries.whole("num_attention_heads"), entries.whole("hidden_size")
    if entries.is_null("num_key_value_heads"):
        return heads, heads, entries.whole("head_dim", max(1, hidden // heads))
    return heads, entries.whole("num_key_value_heads", heads), entries.whole("head_dim", max(1, hidden // heads))


def _windows(architecture: str, entries: Entries, layers: int) -> tuple[int | None, ...]:
    """Each layer's window: null is none, left out the class's."""
    if architecture == "LlamaForCausalLM" or entries.is_null("sliding_window"):
        return (None,) * layers
    window = entries.whole("sliding_window", least=0) or None
    if architecture == "MistralForCausalLM":
        return (window,) * layers
    window = window if entries.flag("use_sliding_window") else None
    if "layer_types" not in entries:
        first = min(layers, entries.whole("max_window_layers", least=0))
        return (None,) * first + (window,) * (layers - first)
    kinds = entries.array("layer_types", str)
    expected = ["full_attention"] + ["sliding_attention"] * (window is not None)
    if len(kinds) != layers or not set(kinds) <= set(expected):
        raise entries.wrong("layer_types", kinds, f"{layers} of {' or '.join(expected)}")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


# ==== GGUF ====

_GGUF_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _read_gguf(file: GGUFFile, entries: Entries) -> LlamaConfig:
    """The shape of the model in a GGUF file, as llama.cpp reads it."""
    shapes = file.shapes
    hidden, layers = entries.whole("embedding_length"), entries.whole("block_count")
    heads = _of_all_layers(entries, "attention.head_count", layers)
    head_dim = entries.whole("attention.key_length", max(1, hidden // heads))
    if entries.whole("attention.value_length", head_dim) != head_dim:
        raise Unsupported(f"{file.path} has values of another width than keys, which is not supported")
    if entries.whole("rope.dimension_count", head_dim) != head_dim:
        raise Unsupported(f"{file.path} rotates only part of each head, which is not supported")
    if entries.whole("expert_count", 0, least=0):
        raise Unsupported(f"{file.path} is a mixture of experts, which is not supported")
    return LlamaConfig(
        architecture=file.metadata["general.architecture"],
        vocab_size=shapes.get("token_embd.weight", (0,))[0],
        hidden_size=hidden,
        intermediate_size=_of_all_layers(entries, "feed_forward_length", layers),
        layers=layers,
        heads=heads,
        kv_heads=_of_all_layers(entries, "attention.head_count_kv", layers, heads),
        head_dim=head_dim,
        context_length=entries.whole("context_length"),
        norm_epsilon=entries.number("attention.layer_norm_rms_epsilon"),
        rope_base=entries.number("rope.freq_base", 10000.0),
        rope_scaling=read_gguf_scaling(file, entries, head_dim),
        windows=(entries.whole("attention.sliding_window", 0, least=0) or None,) * layers,
        qkv_bias="blk.0.attn_q.bias" in shapes,
        output_bias="blk.0.attn_output.bias" in shapes,
        tied_embedding="output.weight" not in shapes,
    )


def _of_all_layers(entries: Entries, key: str, layers: int, default: int | None = None) -> int:
    """A number that may be stated once, or for each layer."""
    if not isinstance(entries.get(key), list):
        return entries.whole(key, default)
    values = entries.array(key, int)
    if len(values) != layers:
        raise entries.wrong(key, values, f"one number, or one for each of {layers} layers")
    if len(set(values)) > 1:
        raise Unsupported(f"{entries.name} has layers that differ in {key}, which is not supported")
    return Entries(entries.name, {key: values[0]}).whole(key)


def _gguf_row_order(config: LlamaConfig, name: str, rows: int) -> Tensor | None:
    if config.architecture != "llama" or name not in ("attn_q", "attn_k"):
        return None
    # llama.cpp rotates neighbours, so its files have the two halves of each head interleaved
    order = torch.arange(rows, device="cpu")
    return order.view(-1, 2, config.head_dim // 2).transpose(1, 2).flatten()


_ARCHITECTURES = {"LlamaForCausalLM": _LLAMA, "MistralForCausalLM": _MISTRAL, "Qwen2ForCausalLM": _QWEN2}
_GGUF = GGUF(("llama", "mistral", "qwen2"), _read_gguf, _GGUF_TENSORS, _gguf_row_order)
_FAMILY = Family(_ARCHITECTURES, _read, LlamaWeights, AttentionRunner, _GGUF)
FAMILIES.register("llama", _FAMILY, "Llama 2 and 3, SmolLM2, Mistral, Qwen2")
