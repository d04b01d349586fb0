"""OLMo 2 and 3: a layer's parts norm what they give, and heads of a row are normed together, queries and keys apart.

Three of four layers of OLMo 3 have a window; YaRN is for the others alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pyspec.architectures import FAMILIES, GGUF, Family
from pyspec.architectures.decoder import BEHIND, DecoderConfig, read_decoder
from pyspec.architectures.llama import LlamaWeights
from pyspec.architectures.rotary import read_local_rope
from pyspec.architectures.shapes import (
    DEFAULTS,
    GGUF_TENSORS,
    read_activation,
    read_gguf_shape,
    read_kinds,
    read_shape,
)
from pyspec.entries import Entries
from pyspec.runners.attention import AttentionRunner

if TYPE_CHECKING:
    from pyspec.checkpoints.gguf import GGUFFile

__all__ = ["OlmoConfig"]


@dataclass(frozen=True)
class OlmoConfig(DecoderConfig):
    """The shape of a model."""

    norm_names = BEHIND  # noqa: RUF012


_OLMO2 = DEFAULTS | {"vocab_size": 50304, "intermediate_size": 11008, "max_position_embeddings": 2048}
_OLMO2 |= {"rms_norm_eps": 1e-5}
_OLMO3 = _OLMO2 | {"sliding_window": 4096}
_PERIOD = 4  # of layers with a window, of which the last has none


def _read(source: Path | str, entries: Entries, architecture: str) -> OlmoConfig:
    if architecture == "Olmo2ForCausalLM":
        return OlmoConfig(**read_decoder(source, entries, architecture), head_norm="row")
    shape = read_shape(source, entries, architecture)
    shape |= {"qkv_bias": entries.flag("attention_bias"), "output_bias": entries.flag("attention_bias")}
    shape |= {"activation": read_activation(source, entries), "head_norm": "row"}
    theta, scaling, local_theta = read_local_rope(source, entries, 5e5, 5e5)
    window = None if entries.is_null("sliding_window") else entries.whole("sliding_window", least=0) or None
    is_local = read_kinds(entries, shape["layers"], lambda layer: (layer + 1) % _PERIOD != 0, has_window=True)
    return OlmoConfig(**shape, rope_base=theta, rope_scaling=scaling, **_windows(is_local, window, local_theta))


def _windows(is_local: list[bool], window: int | None, theta: float) -> dict:
    return {
        "windows": tuple(window if local else None for local in is_local),
        "turns": tuple("local" if local else "global" for local in is_local),
        "local_rope_base": theta,
    }


def _read_gguf(file: GGUFFile, entries: Entries) -> OlmoConfig:
    """The shape of the model in a GGUF file, as llama.cpp reads it: OLMo 3 is an OLMo 2 with a window."""
    shape = read_gguf_shape(file, entries)
    if window := entries.whole("attention.sliding_window", 0, least=0):
        is_local = [(layer + 1) % _PERIOD != 0 for layer in range(shape["layers"])]
        shape |= _windows(is_local, window, shape["rope_base"])
    return OlmoConfig(**shape, head_norm="row")


_TENSORS = GGUF_TENSORS | {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_TENSORS |= {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_GGUF = GGUF(("olmo2",), _read_gguf, _TENSORS)
_ARCHITECTURES = {"Olmo2ForCausalLM": _OLMO2, "Olmo3ForCausalLM": _OLMO3}
FAMILIES.register("olmo", Family(_ARCHITECTURES, _read, LlamaWeights, AttentionRunner, _GGUF), "OLMo 2 and 3")
