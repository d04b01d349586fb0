"""Phi-3, Phi-4 and their minis: Llama's layers, stored as joined matrices, with heads that may be turned in part.

The minis for long texts have longrope: other frequencies for texts behind a switch, which are then read again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pyspec.architectures import FAMILIES, GGUF, Family
from pyspec.architectures.decoder import DecoderConfig
from pyspec.architectures.llama import LlamaWeights
from pyspec.architectures.rotary import RopeScaling, read_long, read_scaling, rope_entries
from pyspec.architectures.shapes import DEFAULTS, GGUF_TENSORS, read_activation, read_gguf_shape, read_shape
from pyspec.entries import Entries
from pyspec.runners.attention import AttentionRunner

if TYPE_CHECKING:
    from pyspec.checkpoints.gguf import GGUFFile

__all__ = ["Phi3Config"]


@dataclass(frozen=True)
class Phi3Config(DecoderConfig):
    """The shape of a model."""

    fused = ("qkv", "gate_up")


_DEFAULTS = DEFAULTS | {"vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192}
_DEFAULTS |= {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096}


def _read(source: Path | str, entries: Entries, architecture: str) -> Phi3Config:
    shape, rope = read_shape(source, entries, architecture), rope_entries(entries)
    part = rope.number("partial_rotary_factor", entries.number("partial_rotary_factor", 1.0))
    window = entries.whole("sliding_window", 0, least=0) or None
    return Phi3Config(
        **shape,
        rope_base=rope.number("rope_theta", entries.number("rope_theta", 10000.0)),
        rope_scaling=_read_scaling(source, entries, rope, shape["context_length"]),
        windows=(window,) * shape["layers"],
        activation=read_activation(source, entries),
        rope_width=int(shape["head_dim"] * part),
    )


def _read_scaling(source: Path | str, entries: Entries, rope: Entries, context: int) -> RopeScaling | None:
    """longrope has other names in early files."""
    if rope.text("rope_type", rope.text("type", "default")) not in ("su", "yarn", "longrope"):
        return read_scaling(source, entries, rope)
    stated = rope if "original_max_position_embeddings" in rope else entries
    return read_long(rope, stated.whole("original_max_position_embeddings"), context)


def _read_gguf(file: GGUFFile, entries: Entries) -> Phi3Config:
    """The shape of the model in a GGUF file, as llama.cpp reads it, which does not obey its window."""
    shape = read_gguf_shape(file, entries)
    return Phi3Config(**shape, rope_width=entries.whole("rope.dimension_count", shape["head_dim"]))


_TENSORS = GGUF_TENSORS | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_GGUF = GGUF(("phi3",), _read_gguf, _TENSORS)
_FAMILY = Family({"Phi3ForCausalLM": _DEFAULTS}, _read, LlamaWeights, AttentionRunner, _GGUF)
FAMILIES.register("phi3", _FAMILY, "Phi-3 and Phi-4")
