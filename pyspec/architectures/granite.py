"""Granite 3: Llama's layers with multipliers of embeddings, scores, logits and of what a layer adds.

A layer adds m times what it gives. Here the stream is kept divided by m: what is added is then what a layer gives, the
embedding is multiplied by 1 / m beside its own multiplier, and a norm, which divides by sqrt(mean square + epsilon),
gives what it gave with an epsilon of 1 / m^2 times its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyspec.architectures import FAMILIES, GGUF, Family
from pyspec.architectures.decoder import DecoderConfig
from pyspec.architectures.llama import LlamaWeights
from pyspec.architectures.rotary import read_rope
from pyspec.architectures.shapes import (
    DEFAULTS,
    GGUF_TENSORS,
    interleaved_rows,
    read_activation,
    read_gguf_shape,
    read_shape,
)
from pyspec.entries import Entries
from pyspec.runners.attention import AttentionRunner

if TYPE_CHECKING:
    from pyspec.checkpoints.gguf import GGUFFile

__all__ = []

_DEFAULTS = DEFAULTS | {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048}
_DEFAULTS |= {"rms_norm_eps": 1e-6, "embedding_multiplier": 1.0, "residual_multiplier": 1.0}
_DEFAULTS |= {"attention_multiplier": 1.0, "logits_scaling": 1.0}


def _scaled(shape: dict[str, Any], embedding: float, residual: float, scores: float, logits: float) -> DecoderConfig:
    shape["norm_epsilon"] /= residual**2
    multipliers = {"embedding_scale": embedding / residual, "attention_scale": scores, "logits_scale": 1 / logits}
    return DecoderConfig(**shape, **multipliers)


def _read(source: Path | str, entries: Entries, architecture: str) -> DecoderConfig:
    shape = read_shape(source, entries, architecture)
    shape["rope_base"], shape["rope_scaling"] = read_rope(source, entries)
    shape |= {"qkv_bias": entries.flag("attention_bias"), "output_bias": entries.flag("attention_bias")}
    names = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
    return _scaled(shape | {"activation": read_activation(source, entries)}, *map(entries.number, names))


def _read_gguf(file: GGUFFile, entries: Entries) -> DecoderConfig:
    shape = read_gguf_shape(file, entries)
    names = {"embedding_scale": 1.0, "residual_scale": 1.0, "attention.scale": shape["head_dim"] ** -0.5}
    return _scaled(shape, *(entries.number(*pair) for pair in names.items()), entries.number("logit_scale"))


_GGUF = GGUF(("granite",), _read_gguf, GGUF_TENSORS, interleaved_rows)
_FAMILY = Family({"GraniteForCausalLM": _DEFAULTS}, _read, LlamaWeights, AttentionRunner, _GGUF)
FAMILIES.register("granite", _FAMILY, "Granite 3")
