"""Gemma 1, 2 and 3 (text): norms whose weights leave 1 out, GELU, scaled embeddings.

Since 2 a layer's parts have norms around them, and most layers a window; 2 caps scores and logits; 3 norms queries and
keys, and has a rotary base of its own for windows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pyspec.architectures import FAMILIES, GGUF, Family
from pyspec.architectures.decoder import AROUND, DecoderConfig, read_decoder
from pyspec.architectures.llama import LlamaWeights
from pyspec.architectures.rotary import read_local_rope, read_rope
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

__all__ = ["GemmaConfig"]


@dataclass(frozen=True)
class GemmaConfig(DecoderConfig):
    """The shape of a Gemma 2 or 3."""

    norm_names = AROUND  # noqa: RUF012


# ==== config.json ====

_SHARED = {"num_hidden_layers": 26, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
_GEMMA = DEFAULTS | _SHARED | {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
_GEMMA |= {"num_key_value_heads": 16, "head_dim": 256, "intermediate_size": 24576, "vocab_size": 256000}
_GEMMA |= {"hidden_act": "gelu_pytorch_tanh"}
_GEMMA2 = _GEMMA | {"hidden_size": 2304, "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4}
_GEMMA2 |= {"intermediate_size": 9216, "sliding_window": 4096, "query_pre_attn_scalar": 256}
_GEMMA2 |= {"hidden_activation": "gelu_pytorch_tanh", "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}
_GEMMA3 = _GEMMA2 | {"vocab_size": 262208, "max_position_embeddings": 131072, "sliding_window_pattern": 6}
_GEMMA3 |= {"final_logit_softcapping": None, "attn_logit_softcapping": None}


def _shared(source: Path | str, entries: Entries, architecture: str) -> dict:
    shape = read_shape(source, entries, architecture)
    has_bias = entries.flag("attention_bias")
    scale = math.sqrt(shape["hidden_size"])
    return shape | {"qkv_bias": has_bias, "output_bias": has_bias, "norm_offset": 1.0, "embedding_scale": scale}


def _read(source: Path | str, entries: Entries, architecture: str) -> DecoderConfig:
    shape = read_decoder(source, entries, architecture)
    return DecoderConfig(**shape, norm_offset=1.0, embedding_scale=math.sqrt(shape["hidden_size"]))


def _read_windowed(source: Path | str, entries: Entries, architecture: str) -> GemmaConfig:
    """Gemma 2 and 3."""
    shape, is_third = _shared(source, entries, architecture), architecture != "Gemma2ForCausalLM"
    period = entries.whole("sliding_window_pattern") if is_third else 2
    window = None if entries.is_null("sliding_window") else entries.whole("sliding_window", least=0) or None
    is_local = read_kinds(entries, shape["layers"], lambda layer: (layer + 1) % period != 0, has_window=True)
    if is_third:
        theta, scaling, local_theta = read_local_rope(source, entries, 1e6, 1e4, "rope_local_base_freq")
    else:
        (theta, scaling), local_theta = read_rope(source, entries), 1e4
    caps = {
        ours: None if entries.is_null(theirs) or entries.get(theirs) is None else entries.number(theirs)
        for ours, theirs in (
            ("logits_softcap", "final_logit_softcapping"),
            ("attention_softcap", "attn_logit_softcapping"),
        )
    }
    return GemmaConfig(
        **shape,
        **caps,
        rope_base=theta,
        rope_scaling=scaling,
        windows=tuple(window if local else None for local in is_local),
        activation=read_activation(source, entries, "hidden_activation"),
        head_norm="head" if is_third else None,
        attention_scale=entries.number("query_pre_attn_scalar") ** -0.5,
        turns=tuple("local" if local else "global" for local in is_local) if is_third else (),
        local_rope_base=local_theta,
    )


# ==== GGUF ====

_LARGEST = {"gemma2": 46, "gemma3": 62}  # layers of the 27B models, whose scores are scaled otherwise


def _read_gguf(file: GGUFFile, entries: Entries) -> DecoderConfig:
    """The shape of the model in a GGUF file, as llama.cpp reads it; weights of norms have their 1 there."""
    shape = read_gguf_shape(file, entries)
    shape |= {"activation": "gelu_tanh", "embedding_scale": math.sqrt(shape["hidden_size"])}
    name, layers = shape["architecture"], shape["layers"]
    if name == "gemma":
        return DecoderConfig(**shape)
    period = entries.whole("attention.sliding_window_pattern", 6) if name == "gemma3" else 2
    is_local = [(layer + 1) % period != 0 for layer in range(layers)]
    window = entries.whole("attention.sliding_window", 4096 if name == "gemma2" else 0, least=0) or None
    width = shape["hidden_size"] // shape["heads"] if layers == _LARGEST[name] else shape["head_dim"]
    caps = {}
    if name == "gemma2":
        caps["attention_softcap"] = entries.number("attn_logit_softcapping", 50.0)
    if name == "gemma2" or "final_logit_softcapping" in entries:
        caps["logits_softcap"] = entries.number("final_logit_softcapping", 30.0)
    return GemmaConfig(
        **shape,
        **caps,
        windows=tuple(window if local else None for local in is_local),
        head_norm="head" if name == "gemma3" else None,
        attention_scale=width**-0.5,
        turns=tuple("local" if local else "global" for local in is_local) if name == "gemma3" else (),
        local_rope_base=entries.number("rope.freq_base_swa", 10000.0),
    )


_TENSORS = GGUF_TENSORS | {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_AROUND = {"ffn_norm": "pre_feedforward_layernorm", "post_attention_norm": "post_attention_layernorm"}
_AROUND |= {"post_ffw_norm": "post_feedforward_layernorm"}
_FIRST = Family(
    {"GemmaForCausalLM": _GEMMA}, _read, LlamaWeights, AttentionRunner, GGUF(("gemma",), _read_gguf, GGUF_TENSORS)
)
_LATER = Family(
    {"Gemma2ForCausalLM": _GEMMA2, "Gemma3ForCausalLM": _GEMMA3, "Gemma3ForConditionalGeneration": _GEMMA3},
    _read_windowed,
    LlamaWeights,
    AttentionRunner,
    GGUF(("gemma2", "gemma3"), _read_gguf, _TENSORS | _AROUND),
)
FAMILIES.register("gemma", _FIRST, "Gemma")
FAMILIES.register("gemma3", _LATER, "Gemma 2 and 3 (text)")
