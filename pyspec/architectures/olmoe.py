"""OLMoE: Llama's layers with experts, and heads of a row normed together, queries and keys apart."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pyspec.architectures import FAMILIES, GGUF, Family, Unsupported
from pyspec.architectures.mixture import GGUF_EXPERTS, MixtureConfig, MixtureWeights, read_choices, read_gguf_choices
from pyspec.architectures.rotary import read_rope
from pyspec.architectures.shapes import DEFAULTS, read_activation, read_gguf_shape, read_shape
from pyspec.entries import Entries
from pyspec.runners.attention import AttentionRunner

if TYPE_CHECKING:
    from pyspec.checkpoints.gguf import GGUFFile

__all__ = []

_DEFAULTS = DEFAULTS | {"vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 16}
_DEFAULTS |= {"num_attention_heads": 16, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_DEFAULTS |= {"num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False}


def _read(source: Path | str, entries: Entries, architecture: str) -> MixtureConfig:
    if entries.get("clip_qkv") is not None:
        raise Unsupported(f"{source} has clip_qkv, which AttentionRunner does not have")
    shape = read_shape(source, entries, architecture)
    shape["rope_base"], shape["rope_scaling"] = read_rope(source, entries)
    return MixtureConfig(
        **shape,
        **read_choices(entries),
        expert_size=shape["intermediate_size"],
        renormalise=entries.flag("norm_topk_prob"),
        qkv_bias=entries.flag("attention_bias"),
        output_bias=entries.flag("attention_bias"),
        head_norm="row",
        activation=read_activation(source, entries),
    )


def _read_gguf(file: GGUFFile, entries: Entries) -> MixtureConfig:
    shape = read_gguf_shape(file, entries, is_mixture=True)
    choices = read_gguf_choices(entries)
    return MixtureConfig(**shape, **choices, expert_size=shape["intermediate_size"], head_norm="row")


_TENSORS = GGUF_EXPERTS | {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GGUF = GGUF(("olmoe",), _read_gguf, _TENSORS)
_FAMILY = Family({"OlmoeForCausalLM": _DEFAULTS}, _read, MixtureWeights, AttentionRunner, _GGUF)
FAMILIES.register("olmoe", _FAMILY, "OLMoE")
