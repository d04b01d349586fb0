"""Qwen3.5 and its mixtures (text), Qwen3-Next: gated delta nets, and attention with gates in every fourth layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyspec.architectures import FAMILIES, GGUF, Family
from pyspec.architectures.decoder import read_decoder, read_rope_width
from pyspec.architectures.delta_net import DeltaLayer, DeltaShape, read_delta_shape
from pyspec.architectures.hybrid import HybridConfig, read_attention_layers
from pyspec.architectures.llama import DecoderLayer, LayerWeights, LlamaWeights
from pyspec.architectures.mixture import (
    GGUF_EXPERTS,
    GGUF_ROUTERS,
    MixtureConfig,
    MixtureWeights,
    SharedExpertPart,
    SharedMixtureLayer,
    read_choices,
    read_gguf_choices,
)
from pyspec.architectures.shapes import DEFAULTS, GGUF_RECURRENT, read_gguf_shape
from pyspec.entries import Entries
from pyspec.runners.recurrent import HybridRunner

if TYPE_CHECKING:
    from pyspec.checkpoints.gguf import GGUFFile

__all__ = []


@dataclass(frozen=True)
class GatedHybridConfig(HybridConfig):
    """The shape of a Qwen3.5."""

    def kind_of(self, layer: int) -> type[DecoderLayer]:
        return LayerWeights if self.is_attention[layer] else DeltaLayer


@dataclass(frozen=True)
class GatedMixtureConfig(GatedHybridConfig, MixtureConfig):
    """The shape of a Qwen3.5 with experts, or of a Qwen3-Next."""

    def kind_of(self, layer: int) -> type[DecoderLayer]:
        if not self.expert_layers[layer]:
            return super().kind_of(layer)
        return SharedMixtureLayer if self.is_attention[layer] else DeltaMixtureLayer


@dataclass
class DeltaMixtureLayer(SharedExpertPart, DeltaLayer):
    """A layer with a gated delta net, experts and one more."""

    MATRICES = (*DeltaLayer.MATRICES, *SharedExpertPart.SHARED)


# ==== config.json ====

_NEXT_NAME = "Qwen3NextForCausalLM"
_SHARED = DEFAULTS | {"num_attention_heads": 16, "head_dim": 256, "max_position_embeddings": 32768}
_SHARED |= {"rms_norm_eps": 1e-6, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128}
_SHARED |= {"linear_value_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32}
_SHARED |= {"full_attention_interval": 4}
_DENSE = _SHARED | {"vocab_size": 248320, "intermediate_size": 12288, "num_key_value_heads": 4}
_MIXTURE = _SHARED | {"hidden_size": 2048, "num_key_value_heads": 2, "moe_intermediate_size": 512}
_MIXTURE |= {"shared_expert_intermediate_size": 512, "decoder_sparse_step": 1, "norm_topk_prob": True}
_MIXTURE |= {"intermediate_size": 5632}
_NEXT = _MIXTURE | {"vocab_size": 151936, "num_hidden_layers": 48, "num_experts": 512, "num_experts_per_tok": 10}
_MIXTURE_3_5 = _MIXTURE | {"vocab_size": 248320, "num_hidden_layers": 40, "num_experts": 256, "num_experts_per_tok": 8}


def _read(source: Path | str, entries: Entries, architecture: str) -> GatedHybridConfig:
    return GatedHybridConfig(**_shared(source, entries, architecture))


def _read_mixture(source: Path | str, entries: Entries, architecture: str) -> GatedMixtureConfig:
    shape = _shared(source, entries, architecture)
    is_next, step, dense = architecture == _NEXT_NAME, 1, []
    if is_next:
        step, dense = entries.whole("decoder_sparse_step"), entries.array("mlp_only_layers", int, [])
    return GatedMixtureConfig(
        **shape,
        **read_choices(entries),
        expert_size=entries.whole("moe_intermediate_size"),
        shared_size=entries.whole("shared_expert_intermediate_size"),
        renormalise=not is_next or entries.flag("norm_topk_prob"),
        expert_layers=tuple((layer + 1) % step == 0 and layer not in dense for layer in range(shape["layers"])),
    )


def _shared(source: Path | str, entries: Entries, architecture: str) -> dict[str, Any]:
    shape, period = read_decoder(source, entries, architecture, in_part=True), entries.whole("full_attention_interval")
    is_attention = read_attention_layers(entries, shape["layers"], "linear_attention", period)
    own = {"inputs": ("qkvz", "ba")} if architecture == _NEXT_NAME else {}
    return shape | {
        "rope_width": read_rope_width(entries, shape["head_dim"], 0.25),
        "head_norm": "head",
        "norm_offset": 1.0,
        "is_gated": True,
        "is_attention": is_attention,
        "recurrence": read_delta_shape(entries, is_attention.count(False), **own),
    }


# ==== GGUF ====


def _read_gguf(file: GGUFFile, entries: Entries) -> GatedHybridConfig:
    return GatedHybridConfig(**_shared_gguf(file, entries, is_mixture=False))


def _read_gguf_mixture(file: GGUFFile, entries: Entries) -> GatedMixtureConfig:
    return GatedMixtureConfig(
        **_shared_gguf(file, entries, is_mixture=True),
        **read_gguf_choices(entries),
        expert_size=entries.whole("expert_feed_forward_length"),
        shared_size=entries.whole("expert_shared_feed_forward_length"),
        renormalise=True,
    )


def _shared_gguf(file: GGUFFile, entries: Entries, *, is_mixture: bool) -> dict[str, Any]:
    """As llama.cpp reads it. Weights of norms have their 1 there. In files of Qwen3.5 value heads take turns at the key
    heads, and where a layer guesses further tokens, it is the last of all."""
    blocks, period = entries.whole("block_count"), entries.whole("full_attention_interval", 4)
    entries = entries.with_own({"block_count": blocks - entries.whole("nextn_predict_layers", 0, least=0)})
    shape, heads = read_gguf_shape(file, entries, is_mixture=is_mixture), entries.whole("ssm.time_step_rank")
    is_attention = tuple((layer + 1) % period == 0 for layer in range(shape["layers"]))
    if "attention.recurrent_layers" in entries:
        is_attention = tuple(
            not kind for kind in entries.array("attention.recurrent_layers", bool)[: len(is_attention)]
        )
    own: dict[str, Any] = {"tiled": True}
    if shape["architecture"] == "qwen3next":
        first = f"blk.{is_attention.index(False)}." if False in is_attention else ""
        own = {"inputs": ("qkvz", "ba") if f"{first}ssm_in.weight" in file.shapes else ("qkv", "z", "ba")}
    recurrence = DeltaShape(
        layers=is_attention.count(False),
        heads=heads,
        head_dim=entries.whole("ssm.inner_size") // heads,
        key_heads=entries.whole("ssm.group_count"),
        state_size=entries.whole("ssm.state_size"),
        conv_taps=entries.whole("ssm.conv_kernel"),
        **own,
    )
    return shape | {
        "rope_width": entries.whole("rope.dimension_count", shape["head_dim"] // 4),
        "qkv_bias": any(name.endswith(".attn_q.bias") for name in file.shapes),
        "output_bias": any(name.endswith(".attn_output.bias") for name in file.shapes),
        "head_norm": "head",
        "is_gated": True,
        "is_attention": is_attention,
        "recurrence": recurrence,
    }


_GGUF_TENSORS = GGUF_EXPERTS | {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_in": "linear_attn.in_proj_qkvz",
    "ssm_ba": "linear_attn.in_proj_ba",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_dt.bias": "linear_attn.dt_bias",
    "ssm_a": "linear_attn.A_log",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
    "nextn.eh_proj": "fc",
    "nextn.enorm": "pre_fc_norm_embedding",
    "nextn.hnorm": "pre_fc_norm_hidden",
    "nextn.shared_head_norm": "norm",
}


# ==== the order of rows ====


def _row_order(config: GatedHybridConfig, name: str, rows: int) -> Tensor | None:
    """Checkpoints have each head's queries and then its gates; here all gates come first. In Qwen3-Next each key head
    brings what belongs to it, q, k, v and z, or beta and decay; here all heads' q come first, then all k, and so on."""
    shape, order = config.recurrence, torch.arange(rows, device="cpu")
    if name.endswith(("self_attn.q_proj.weight", "self_attn.q_proj.bias")):
        gates, queries = order.view(2, config.heads, config.head_dim)
        return torch.stack((queries, gates), 1).flatten()
    if name.endswith("linear_attn.in_proj_qkvz.weight"):
        parts = [shape.key_channels] * 2 + [shape.channels] * 2
    elif name.endswith("linear_attn.in_proj_ba.weight"):
        parts = [shape.heads] * 2
    else:
        return None
    return torch.cat([part.view(shape.key_heads, -1) for part in order.split(parts)], 1).flatten()


_OF_ONE = ("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration")  # text turns by one position, in all sections
_OF_MANY = ("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration")
_GGUF = GGUF(("qwen35",), _read_gguf, _GGUF_TENSORS, restored=GGUF_RECURRENT)
_FAMILY = Family(dict.fromkeys(_OF_ONE, _DENSE), _read, LlamaWeights, HybridRunner, _GGUF, _row_order)
FAMILIES.register("qwen3_5", _FAMILY, "Qwen3.5")
_ARCHITECTURES = dict.fromkeys(_OF_MANY, _MIXTURE_3_5) | {_NEXT_NAME: _NEXT}
_GGUF = GGUF(("qwen35moe", "qwen3next"), _read_gguf_mixture, _GGUF_TENSORS, restored=GGUF_RECURRENT | GGUF_ROUTERS)
_FAMILY = Family(_ARCHITECTURES, _read_mixture, MixtureWeights, HybridRunner, _GGUF, _row_order)
FAMILIES.register("qwen3_5_moe", _FAMILY, "Qwen3-Next, Qwen3.5 MoE")
