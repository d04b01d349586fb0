"""Granite 4: Granite's multipliers, attention, Mamba-2 or both, experts or none, and an inner part of all rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyspec.architectures import FAMILIES, GGUF, Family
from pyspec.architectures.decoder import read_decoder
from pyspec.architectures.granite import DEFAULTS_3, read_gguf_multipliers, read_multipliers
from pyspec.architectures.hybrid import HybridConfig, HybridMamba2Layer, read_gguf_kinds
from pyspec.architectures.llama import DecoderLayer, LayerWeights
from pyspec.architectures.mamba import check_silu
from pyspec.architectures.mamba2 import (
    RESTORED_MAMBA2,
    check_no_limit,
    gguf_mamba2,
    read_gguf_mamba2_shape,
    read_mamba2_shape,
)
from pyspec.architectures.mixture import (
    GGUF_EXPERTS,
    ExpertCheckpoint,
    MixtureConfig,
    MixtureWeights,
    SharedExpertPart,
    SharedMixtureLayer,
    read_choices,
    read_gguf_choices,
)
from pyspec.architectures.shapes import interleaved_rows
from pyspec.entries import Entries
from pyspec.runners.attention import AttentionRunner
from pyspec.runners.recurrent import HybridRunner

if TYPE_CHECKING:
    from pyspec.checkpoints.gguf import GGUFFile

__all__ = []


@dataclass
class Mamba2MixtureLayer(SharedExpertPart, HybridMamba2Layer):
    """A layer with a recurrence of Mamba-2, experts and one more."""

    MATRICES = (*HybridMamba2Layer.MATRICES, *SharedExpertPart.SHARED)


@dataclass(frozen=True)
class Granite4Config(MixtureConfig):
    """The shape of a model whose layers are all attention. fused: matrices that the checkpoint has as one."""

    runner = AttentionRunner

    fused: tuple[str, ...] = ()


@dataclass(frozen=True)
class Granite4HybridConfig(HybridConfig, Granite4Config):
    """The shape of a model with recurrent layers, those of a Mamba-2."""

    runner = HybridRunner

    def kind_of(self, layer: int) -> type[DecoderLayer]:
        if not self.expert_layers[layer]:
            return LayerWeights if self.is_attention[layer] else HybridMamba2Layer
        return SharedMixtureLayer if self.is_attention[layer] else Mamba2MixtureLayer


class Granite4Weights(MixtureWeights):
    """All weights, by the names of Hugging Face's Qwen3 MoE."""

    @staticmethod
    def checkpoint(stored, config: MixtureConfig) -> Granite4Checkpoint:
        return Granite4Checkpoint(stored, config)


class Granite4Checkpoint(ExpertCheckpoint):
    """A checkpoint of Granite 4, see ExpertCheckpoint: what is of all rows has a name of its own."""

    def __init__(self, stored, config: MixtureConfig):
        shared = ".mlp.shared_expert." if config.shared_size else ".mlp."
        self.NAMES = (
            *ExpertCheckpoint.NAMES,
            (r"\.shared_mlp\.input_linear\.", f"{shared}gate_up_proj."),
            (r"\.shared_mlp\.output_linear\.", f"{shared}down_proj."),
        )
        super().__init__(stored)


# ==== config.json ====

_DEFAULTS = DEFAULTS_3 | {"num_local_experts": 8, "num_experts_per_tok": 2, "shared_intermediate_size": 1024}
_DEFAULTS |= {"mamba_n_heads": 128, "mamba_n_groups": 1, "mamba_d_state": 256, "mamba_d_conv": 4, "mamba_expand": 2}
_DEFAULTS |= {"mamba_conv_bias": True, "mamba_proj_bias": False}
_KINDS = {"mamba": False, "linear_attention": False, "attention": True, "full_attention": True}


def _read(source: Path | str, entries: Entries, architecture: str) -> Granite4Config:
    shape = read_decoder(source, entries, architecture) | read_multipliers(entries)
    shape |= {"fused": ("gate_up",)} | _experts(entries, shape)
    layers = shape["layers"]
    kinds = entries.array("layer_types", str, entries.get("layers_block_type", ["mamba"] * layers))
    if len(kinds) != layers or not set(kinds) <= _KINDS.keys():
        raise entries.wrong("layer_types", kinds, f"{layers} of {', '.join(_KINDS)}")
    is_attention = tuple(_KINDS[kind] for kind in kinds)
    if entries.text("position_embedding_type", "nope") != "rope":
        shape["turns"] = ("none",) * layers
    if all(is_attention):
        return Granite4Config(**shape)
    check_silu(source, entries, "HybridRunner")
    check_no_limit(source, entries, "HybridRunner")
    recurrence = read_mamba2_shape(entries, is_attention.count(False), entries.number("rms_norm_eps"))
    return Granite4HybridConfig(**shape, is_attention=is_attention, recurrence=recurrence)


def _experts(entries: Entries, shape: dict[str, Any]) -> dict[str, Any]:
    """Fields of a MixtureConfig; without experts the part of all rows is a feed-forward part like any other."""
    shared, layers = entries.whole("shared_intermediate_size"), shape["layers"]
    if not entries.whole("num_local_experts", least=0):
        return {"intermediate_size": shared, "expert_layers": (False,) * layers}
    own = {"expert_size": shape["intermediate_size"], "shared_size": shared, "shared_gate": False, "renormalise": True}
    return read_choices(entries) | own


# ==== GGUF ====


def _read_gguf(file: GGUFFile, entries: Entries) -> Granite4HybridConfig:
    """The shape of the model in a GGUF file, of a Bamba too, as llama.cpp reads it."""
    shape, is_attention = read_gguf_kinds(file, entries)
    shape |= read_gguf_multipliers(entries.with_defaults({"logit_scale": 1.0}), shape)
    layers = shape["layers"]
    if entries.flag("rope.scaling.finetuned", False):
        shape["rope_width"] = entries.whole("rope.dimension_count", shape["head_dim"])
    else:
        shape["turns"] = ("none",) * layers
    if entries.whole("expert_count", 0, least=0):
        shape |= read_gguf_choices(entries)
        shape |= {"expert_size": shape["intermediate_size"], "renormalise": True, "shared_gate": False}
        shape["shared_size"] = entries.whole("expert_shared_feed_forward_length")
    else:
        shape["expert_layers"] = (False,) * layers
    recurrence = read_gguf_mamba2_shape(file, entries, is_attention.count(False))
    return Granite4HybridConfig(**shape, is_attention=is_attention, recurrence=recurrence)


_TENSORS = GGUF_EXPERTS | gguf_mamba2("mamba.")
_GGUF = GGUF(("granitehybrid",), _read_gguf, _TENSORS, interleaved_rows, RESTORED_MAMBA2)
_FAMILY = Family({"GraniteMoeHybridForCausalLM": _DEFAULTS}, _read, Granite4Weights, HybridRunner, _GGUF)
FAMILIES.register("granite_hybrid", _FAMILY, "Granite 4, hybrids of attention and Mamba-2 or attention alone")
