"""EXAONE 4: a layer's parts norm what they give, queries and keys are normed, each head by itself.

Where some layers have a window, the others do not turn their heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pyspec.architectures import FAMILIES, GGUF, Family
from pyspec.architectures.decoder import BEHIND, DecoderConfig, read_decoder
from pyspec.architectures.llama import LlamaWeights
from pyspec.architectures.shapes import (
    DEFAULTS,
    GGUF_TENSORS,
    read_gguf_shape,
    read_kinds,
)
from pyspec.entries import Entries
from pyspec.runners.attention import AttentionRunner

if TYPE_CHECKING:
    from pyspec.checkpoints.gguf import GGUFFile

__all__ = ["Exaone4Config"]


@dataclass(frozen=True)
class Exaone4Config(DecoderConfig):
    """The shape of a model."""

    norm_names = BEHIND  # noqa: RUF012


_DEFAULTS = DEFAULTS | {"vocab_size": 102400, "intermediate_size": 16384, "max_position_embeddings": 2048}
_DEFAULTS |= {"num_key_value_heads": 32, "rms_norm_eps": 1e-5, "sliding_window": 4096, "sliding_window_pattern": 4}


def _windowed(window: int | None, is_local: list[bool]) -> dict:
    if window is None:
        return {}
    windows = tuple(window if local else None for local in is_local)
    return {"windows": windows, "turns": tuple("global" if local else "none" for local in is_local)}


def _read(source: Path | str, entries: Entries, architecture: str) -> Exaone4Config:
    shape = read_decoder(source, entries, architecture) | {"qkv_bias": False, "output_bias": False}
    window = None if entries.is_null("sliding_window") else entries.whole("sliding_window")
    period = 1 if window is None or "layer_types" in entries else entries.whole("sliding_window_pattern")
    is_local = read_kinds(
        entries, shape["layers"], lambda layer: (layer + 1) % period != 0, has_window=window is not None
    )
    return Exaone4Config(**shape, **_windowed(window, is_local), head_norm="head")


def _read_gguf(file: GGUFFile, entries: Entries) -> Exaone4Config:
    """The shape of the model in a GGUF file, as llama.cpp reads it: with a window, three of four layers have it."""
    shape = read_gguf_shape(file, entries)
    window = entries.whole("attention.sliding_window", 0, least=0) or None
    is_local = [(layer + 1) % 4 != 0 for layer in range(shape["layers"])]
    return Exaone4Config(**shape, **_windowed(window, is_local), head_norm="head")


_TENSORS = GGUF_TENSORS | {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_TENSORS |= {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_GGUF = GGUF(("exaone4",), _read_gguf, _TENSORS)
_FAMILY = Family({"Exaone4ForCausalLM": _DEFAULTS}, _read, LlamaWeights, AttentionRunner, _GGUF)
FAMILIES.register("exaone4", _FAMILY, "EXAONE 4")
