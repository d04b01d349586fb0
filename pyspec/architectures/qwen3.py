"""Qwen3: Llama's layers with norms of queries and keys, each head by itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pyspec.architectures import FAMILIES, GGUF, Family
from pyspec.architectures.decoder import DecoderConfig
from pyspec.architectures.llama import LlamaWeights, read_qwen_windows
from pyspec.architectures.rotary import read_rope
from pyspec.architectures.shapes import DEFAULTS, GGUF_TENSORS, read_activation, read_gguf_shape, read_shape
from pyspec.entries import Entries
from pyspec.runners.attention import AttentionRunner

if TYPE_CHECKING:
    from pyspec.checkpoints.gguf import GGUFFile

__all__ = []

_DEFAULTS = DEFAULTS | {"vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768}
_DEFAULTS |= {"num_key_value_heads": 32, "head_dim": 128, "rms_norm_eps": 1e-6}
_DEFAULTS |= {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28}

_OF_IMAGES = "Qwen3VLForConditionalGeneration"  # text turns by the same positions in all three sections


def _read(source: Path | str, entries: Entries, architecture: str) -> DecoderConfig:
    shape = read_shape(source, entries, architecture)
    theta, scaling = read_rope(source, entries, 5e5 if architecture == _OF_IMAGES else 1e4)
    return DecoderConfig(
        **shape,
        rope_base=theta,
        rope_scaling=scaling,
        windows=read_qwen_windows(entries, shape["layers"]),
        qkv_bias=entries.flag("attention_bias"),
        output_bias=entries.flag("attention_bias"),
        activation=read_activation(source, entries),
        head_norm="head",
    )


def _read_gguf(file: GGUFFile, entries: Entries) -> DecoderConfig:
    return DecoderConfig(**read_gguf_shape(file, entries), head_norm="head")


_ARCHITECTURES = {"Qwen3ForCausalLM": _DEFAULTS, _OF_IMAGES: _DEFAULTS | {"max_position_embeddings": 128000}}
_TENSORS = GGUF_TENSORS | {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GGUF = GGUF(("qwen3",), _read_gguf, _TENSORS)
FAMILIES.register("qwen3", Family(_ARCHITECTURES, _read, LlamaWeights, AttentionRunner, _GGUF), "Qwen3")
