"""Qwen2 and Qwen3 MoE: layers of Qwen2 and Qwen3 with experts; Qwen2 has one more, of all rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pyspec.architectures import FAMILIES, GGUF, Family
from pyspec.architectures.mixture import (
    GGUF_EXPERTS,
    GGUF_ROUTERS,
    MixtureConfig,
    MixtureWeights,
    read_choices,
    read_gguf_choices,
)
from pyspec.architectures.rotary import read_rope
from pyspec.architectures.shapes import DEFAULTS, read_activation, read_gguf_shape, read_kinds, read_shape
from pyspec.entries import Entries
from pyspec.runners.attention import AttentionRunner

if TYPE_CHECKING:
    from pyspec.checkpoints.gguf import GGUFFile

__all__ = []

_SHARED = DEFAULTS | {"vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 24, "rms_norm_eps": 1e-6}
_SHARED |= {"max_position_embeddings": 32768, "sliding_window": 4096, "use_sliding_window": False}
_SHARED |= {"decoder_sparse_step": 1, "norm_topk_prob": False}
_QWEN2 = _SHARED | {"intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 16}
_QWEN2 |= {"max_window_layers": 28, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632}
_QWEN2 |= {"num_experts": 60, "num_experts_per_tok": 4, "qkv_bias": True}
_QWEN3 = _SHARED | {"intermediate_size": 6144, "num_key_value_heads": 4, "moe_intermediate_size": 768}
_QWEN3 |= {"num_experts": 128, "num_experts_per_tok": 8}


def _read(source: Path | str, entries: Entries, architecture: str) -> MixtureConfig:
    shape, is_qwen2 = read_shape(source, entries, architecture), architecture == "Qwen2MoeForCausalLM"
    shape["rope_base"], shape["rope_scaling"] = read_rope(source, entries)
    layers, window = shape["layers"], None
    if entries.flag("use_sliding_window") and not entries.is_null("sliding_window"):
        window = entries.whole("sliding_window", least=0) or None
    is_local = [window is not None] * layers
    if is_qwen2:
        last = entries.whole("max_window_layers", least=0)
        is_local = read_kinds(
            entries, layers, lambda layer: layer % 2 == 0 and layer < last, has_window=window is not None
        )
        own = {"qkv_bias": entries.flag("qkv_bias"), "shared_size": entries.whole("shared_expert_intermediate_size")}
    else:
        own = {"qkv_bias": entries.flag("attention_bias"), "output_bias": entries.flag("attention_bias")}
        own["head_norm"] = "head"
    step, dense = entries.whole("decoder_sparse_step"), entries.array("mlp_only_layers", int, [])
    return MixtureConfig(
        **shape,
        **own,
        **read_choices(entries),
        expert_size=entries.whole("moe_intermediate_size"),
        renormalise=entries.flag("norm_topk_prob"),
        expert_layers=tuple((layer + 1) % step == 0 and layer not in dense for layer in range(layers)),
        windows=tuple(window if local else None for local in is_local),
        activation=read_activation(source, entries),
    )


def _read_gguf(file: GGUFFile, entries: Entries) -> MixtureConfig:
    """The shape of the model in a GGUF file, as llama.cpp reads it: all layers have experts."""
    shape = read_gguf_shape(file, entries, is_mixture=True)
    choices = read_gguf_choices(entries)
    if shape["architecture"] == "qwen3moe":
        own = {"head_norm": "head", "renormalise": True, "expert_size": entries.whole("expert_feed_forward_length")}
    else:
        count, size = choices["experts_per_token"], shape["intermediate_size"]
        own = {"expert_size": entries.whole("expert_feed_forward_length", size // count)}
        own["shared_size"] = entries.whole("expert_shared_feed_forward_length", size)
    return MixtureConfig(**shape, **choices, **own)


_ARCHITECTURES = {"Qwen2MoeForCausalLM": _QWEN2, "Qwen3MoeForCausalLM": _QWEN3}
_TENSORS = GGUF_EXPERTS | {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GGUF = GGUF(("qwen2moe", "qwen3moe"), _read_gguf, _TENSORS, restored=GGUF_ROUTERS)
_FAMILY = Family(_ARCHITECTURES, _read, MixtureWeights, AttentionRunner, _GGUF)
FAMILIES.register("qwen_moe", _FAMILY, "Qwen2 and Qwen3 MoE")
