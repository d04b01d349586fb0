"""Ministral, Ministral 3 and the text of Mistral Small 3: Mistral's layers, with windows in some of them.

Ministral 3 has YaRN, and multiplies queries by 1 + b log(1 + p // c) at position p, with c the length of its first
training: up to there by 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pyspec.architectures import FAMILIES, GGUF, Family, Unsupported
from pyspec.architectures.decoder import DecoderConfig, read_decoder
from pyspec.architectures.llama import LlamaWeights
from pyspec.architectures.rotary import rope_entries
from pyspec.architectures.shapes import DEFAULTS, GGUF_TENSORS, interleaved_rows, read_gguf_shape, read_kinds
from pyspec.entries import Entries
from pyspec.runners.attention import AttentionRunner

if TYPE_CHECKING:
    from pyspec.checkpoints.gguf import GGUFFile

__all__ = []

_MISTRAL = DEFAULTS | {"vocab_size": 32000, "intermediate_size": 14336, "max_position_embeddings": 131072}
_MISTRAL |= {"num_key_value_heads": 8, "sliding_window": 4096, "rms_norm_eps": 1e-6}
_YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384}
_YARN |= {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
_MINISTRAL3 = _MISTRAL | {"vocab_size": 131072, "num_hidden_layers": 34, "head_dim": 128, "rms_norm_eps": 1e-5}
_MINISTRAL3 |= {"max_position_embeddings": 262144, "sliding_window": None, "rope_parameters": _YARN}
_OF_IMAGES = "Mistral3ForConditionalGeneration"
_TEXT = {"mistral": _MISTRAL, "ministral": _MISTRAL, "ministral3": _MINISTRAL3}  # by model_type


def _read(source: Path | str, entries: Entries, architecture: str) -> DecoderConfig:
    if architecture == _OF_IMAGES:
        kind = entries.text("model_type", "mistral")
        if kind not in _TEXT:
            raise Unsupported(f"{source} has text of {kind}, our kernels have that of {', '.join(_TEXT)}")
        entries = entries.with_defaults(_TEXT[kind] | {"tie_word_embeddings": True})
        architecture = {"ministral": "MinistralForCausalLM", "ministral3": "Ministral3ForCausalLM"}.get(kind, "")
    shape, scaling = read_decoder(source, entries, architecture), None
    shape |= {"qkv_bias": False, "output_bias": False}
    window = None
    if not entries.is_null("sliding_window") and entries.get("sliding_window") is not None:
        window = entries.whole("sliding_window", least=0) or None
    is_local = [window is not None] * shape["layers"]
    if architecture == "MinistralForCausalLM":
        is_local = read_kinds(entries, shape["layers"], lambda layer: True, has_window=window is not None)
    rope = rope_entries(entries)
    if architecture == "Ministral3ForCausalLM" and "llama_4_scaling_beta" in rope:
        scaling = rope.number("llama_4_scaling_beta"), rope.whole("original_max_position_embeddings")
    windows = tuple(window if local else None for local in is_local)
    return DecoderConfig(**shape, windows=windows, query_scaling=scaling)


def _read_gguf(file: GGUFFile, entries: Entries) -> DecoderConfig:
    shape, scaling = read_gguf_shape(file, entries), None
    if "attention.temperature_scale" in entries:
        period = entries.whole("rope.scaling.original_context_length", shape["context_length"])
        scaling = entries.number("attention.temperature_scale"), period
    return DecoderConfig(**shape, query_scaling=scaling)


_ARCHITECTURES = {"MinistralForCausalLM": _MISTRAL, "Ministral3ForCausalLM": _MINISTRAL3, _OF_IMAGES: _MISTRAL}
_GGUF = GGUF(("mistral3",), _read_gguf, GGUF_TENSORS, interleaved_rows)
_FAMILY = Family(_ARCHITECTURES, _read, LlamaWeights, AttentionRunner, _GGUF)
FAMILIES.register("ministral", _FAMILY, "Ministral, Ministral 3, Mistral Small 3 (text)")
