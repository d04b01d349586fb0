"""Seed-OSS: Llama's layers with biases of queries, keys and values."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pyspec.architectures import FAMILIES, GGUF, Family
from pyspec.architectures.decoder import DecoderConfig, read_decoder
from pyspec.architectures.llama import LlamaWeights
from pyspec.architectures.shapes import DEFAULTS, GGUF_TENSORS, read_gguf_shape
from pyspec.entries import Entries
from pyspec.runners.attention import AttentionRunner

if TYPE_CHECKING:
    from pyspec.checkpoints.gguf import GGUFFile

__all__ = []

_DEFAULTS = DEFAULTS | {"vocab_size": 155136, "intermediate_size": 27648, "num_hidden_layers": 64}
_DEFAULTS |= {"num_attention_heads": 80, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 524288}
_DEFAULTS |= {"model_type": "seed_oss", "rms_norm_eps": 1e-6, "attention_bias": True, "attention_out_bias": False}


def _read(source: Path | str, entries: Entries, architecture: str) -> DecoderConfig:
    shape = read_decoder(source, entries, architecture)
    return DecoderConfig(**shape | {"output_bias": entries.flag("attention_out_bias")})


def _read_gguf(file: GGUFFile, entries: Entries) -> DecoderConfig:
    return DecoderConfig(**read_gguf_shape(file, entries))


_GGUF = GGUF(("seed_oss",), _read_gguf, GGUF_TENSORS | {"post_attention_norm": "post_attention_layernorm"})
_FAMILY = Family({"SeedOssForCausalLM": _DEFAULTS}, _read, LlamaWeights, AttentionRunner, _GGUF)
FAMILIES.register("seed_oss", _FAMILY, "Seed-OSS")
