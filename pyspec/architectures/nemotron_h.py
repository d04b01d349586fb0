"""Nemotron-H: layers of one part each, which is Mamba-2, attention, a feed-forward part or experts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyspec.architectures import FAMILIES, GGUF, Family, Unsupported
from pyspec.architectures.blocks import tap
from pyspec.architectures.hybrid import HybridConfig, HybridMamba2Layer, read_gguf_kinds
from pyspec.architectures.llama import DecoderLayer, LayerWeights
from pyspec.architectures.mamba2 import (
    RESTORED_MAMBA2,
    Mamba2Part,
    Mamba2Shape,
    check_no_limit,
    gguf_mamba2,
    read_gguf_mamba2_shape,
)
from pyspec.architectures.mixture import (
    GGUF_EXPERTS,
    ExpertCheckpoint,
    MixtureConfig,
    MixtureWeights,
    SharedExpertPart,
    read_gguf_choices,
)
from pyspec.architectures.shapes import DEFAULTS, read_shape
from pyspec.architectures.weights import Blank
from pyspec.entries import Entries
from pyspec.ops.rms_norm import rms_norm
from pyspec.runners.recurrent import HybridRunner

if TYPE_CHECKING:
    from pyspec.checkpoints.gguf import GGUFFile

__all__ = []


@dataclass(frozen=True)
class NemotronHConfig(HybridConfig, MixtureConfig):
    """The shape of a model, whose layers are attention, recurrent, have experts or else are feed-forward parts."""

    norm_names = {"attention": "norm"}  # noqa: RUF012

    def kind_of(self, layer: int) -> type[DecoderLayer]:
        if self.expert_layers[layer]:
            return ExpertBlock
        return AttentionBlock if self.is_attention[layer] else Mamba2Block if self.is_recurrent[layer] else InnerBlock


class Mixer(DecoderLayer):
    """A layer without a feed-forward part."""

    @classmethod
    def empty_feed_forward(cls, config: NemotronHConfig, blank: Blank) -> dict[str, None]:
        return {"gate_up": None, "down": None}

    def named_feed_forward(self, config: NemotronHConfig) -> dict[str, Tensor]:
        return {}


class AttentionBlock(Mixer, LayerWeights):
    """A layer that is attention."""

    MATRICES = ("qkv", "output")


class Mamba2Block(Mixer, HybridMamba2Layer):
    """A layer that is a recurrence of Mamba-2."""

    MATRICES = Mamba2Part.RECURRENCE
    RECURRENCE_NAME = "mixer."


class InnerBlock(DecoderLayer):
    """A layer that is a feed-forward part."""

    @classmethod
    def empty(cls, config: NemotronHConfig, blank: Blank) -> InnerBlock:
        return cls(**cls.empty_parts(config, blank))

    def named(self, config: NemotronHConfig, prefix: str) -> dict[str, Tensor]:
        inner = {f"mlp.{name}.weight": tensor for name, tensor in self.named_feed_forward(config).items()}
        return {prefix + name: tensor for name, tensor in (self.named_norms(config) | inner).items()}

    def mix(self, x: Tensor, config: NemotronHConfig, cache, place: int, numbers) -> Tensor:
        return self.feed_forward(x, config)


class ExpertBlock(SharedExpertPart, InnerBlock):
    """A layer that is experts and one more, of all rows."""

    MATRICES = (*DecoderLayer.MATRICES, *SharedExpertPart.SHARED)


class NemotronHWeights(MixtureWeights):
    """All weights, by names of Hugging Face's Nemotron-H and of its Qwen3 MoE."""

    LAYERS = "backbone.layers."
    EMBEDDING = "backbone.embeddings.weight"
    NORM = "backbone.norm_f.weight"

    @staticmethod
    def checkpoint(stored, config: NemotronHConfig) -> NemotronHCheckpoint:
        return NemotronHCheckpoint(stored)

    def forward(
        self, config: NemotronHConfig, hidden: Tensor, cache, numbers, dtype: torch.dtype, layers=None, taps=()
    ) -> list[Tensor]:
        delta, tapped = None, []
        for index, layer in enumerate(self.layers):
            x = rms_norm(hidden, layer.scales.attention, config.norm_epsilon, delta=delta, out_dtype=dtype)
            if index in taps:
                tapped.append(tap(hidden))
            delta = layer.mix(x, config, cache, config.places[index], numbers)
        normed = rms_norm(hidden, self.last_scale, config.norm_epsilon, delta=delta, out_dtype=dtype)
        return [normed, *tapped, *([tap(hidden)] if config.layers in taps else [])]


class NemotronHCheckpoint(ExpertCheckpoint):
    """A checkpoint of Nemotron-H, see ExpertCheckpoint: what a layer is has one name, whatever it is."""

    NAMES = (
        (r"^model\.", "backbone."),
        (r"\.mixer\.([qkvo]_proj)\.", r".self_attn.\1."),
        (r"\.mixer\.(up_proj|down_proj|gate|experts)\b", r".mlp.\1"),
        (r"\.mixer\.shared_experts\.", ".mlp.shared_expert."),
        (r"\.gate\.e_score_correction_bias$", ".choice_bias.weight"),
    )


# ==== config.json ====

_DEFAULTS = DEFAULTS | {"vocab_size": 131072, "intermediate_size": 21504, "num_key_value_heads": 8, "head_dim": 128}
_DEFAULTS |= {"max_position_embeddings": 4096, "layer_norm_epsilon": 1e-5, "mlp_hidden_act": "relu2"}
_DEFAULTS |= {"mamba_hidden_act": "silu", "mamba_num_heads": 128, "mamba_head_dim": 64, "n_groups": 8}
_DEFAULTS |= {"ssm_state_size": 128, "conv_kernel": 4, "use_conv_bias": True, "use_bias": False}
_DEFAULTS |= {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 7688, "n_group": 1}
_DEFAULTS |= {"moe_shared_expert_intermediate_size": 7688, "routed_scaling_factor": 1.0, "norm_topk_prob": True}
_KINDS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
_KINDS |= {"mamba": "linear_attention", "attention": "full_attention"} | {kind: kind for kind in _KINDS.values()}


def _read(source: Path | str, entries: Entries, architecture: str) -> NemotronHConfig:
    activations = {"mlp_hidden_act": "relu2", "mamba_hidden_act": "silu"}
    for key, wanted in activations.items():
        if (found := entries.text(key)) != wanted:
            raise Unsupported(f"{source} has {key} {found!r}, HybridRunner has {wanted} there")
    check_no_limit(source, entries, "HybridRunner")
    kinds = _read_kinds(entries)
    layers, epsilon = len(kinds), entries.number("layer_norm_epsilon")
    own = {"num_hidden_layers": layers, "model_type": entries.text("model_type", "nemotron_h")}
    shape = read_shape(source, entries.with_own(own), architecture, epsilon="layer_norm_epsilon")
    recurrence = Mamba2Shape(
        hidden_size=shape["hidden_size"],
        layers=kinds.count("linear_attention"),
        heads=entries.whole("mamba_num_heads"),
        head_dim=entries.whole("mamba_head_dim"),
        groups=entries.whole("n_groups"),
        state_size=entries.whole("ssm_state_size"),
        conv_taps=entries.whole("conv_kernel"),
        norm_epsilon=epsilon,
        projection_bias=entries.flag("use_bias"),
        conv_bias=entries.flag("use_conv_bias"),
    )
    return NemotronHConfig(
        **shape,
        **(_read_experts(source, entries) if "moe" in kinds else {}),
        rope_base=10000.0,
        turns=("none",) * layers,
        activation="relu2",
        expert_layers=tuple(kind == "moe" for kind in kinds),
        is_attention=tuple(kind == "full_attention" for kind in kinds),
        is_recurrent=tuple(kind == "linear_attention" for kind in kinds),
        recurrence=recurrence,
    )


def _read_kinds(entries: Entries) -> list[str]:
    """What each layer is, by a list of names or by a letter for each layer."""
    if "hybrid_override_pattern" in entries:
        key, stated = "hybrid_override_pattern", list(entries.text("hybrid_override_pattern"))
    else:
        key = "layers_block_type" if "layers_block_type" in entries else "layer_types"
        stated = entries.array(key, str, ["linear_attention", "moe", "full_attention", "mlp"])
    if not set(stated) <= _KINDS.keys():
        raise entries.wrong(key, entries.get(key), f"layers that are {', '.join(_KINDS)}")
    return [_KINDS[kind] for kind in stated]


def _read_experts(source: Path | str, entries: Entries) -> dict[str, Any]:
    """Fields of a MixtureConfig."""
    if entries.whole("n_group") != 1 or "moe_latent_size" in entries:
        raise Unsupported(f"{source} has n_group above 1 or moe_latent_size, HybridRunner has neither")
    count = entries.whole("n_routed_experts")
    return {
        "experts": count,
        "experts_per_token": entries.whole("num_experts_per_tok", most=count),
        "expert_size": entries.whole("moe_intermediate_size"),
        "shared_size": entries.whole("moe_shared_expert_intermediate_size"),
        "shared_gate": False,
        "sigmoid_gates": True,
        "choice_bias": True,
        "renormalise": entries.flag("norm_topk_prob"),
        "gate_scale": entries.number("routed_scaling_factor"),
    }


# ==== GGUF ====


def _read_gguf(file: GGUFFile, entries: Entries) -> NemotronHConfig:
    """The shape of the model in a GGUF file, as llama.cpp reads it: its tensors say what a layer is."""
    if "moe_latent_size" in entries or entries.whole("expert_group_count", 1) != 1:
        raise Unsupported(f"{file.path} has expert_group_count above 1 or moe_latent_size, HybridRunner has neither")
    shape, is_attention = read_gguf_kinds(file, entries)
    layers, has_experts = shape["layers"], entries.whole("expert_count", 0, least=0) > 0
    if has_experts:
        shape |= read_gguf_choices(entries) | {"expert_size": entries.whole("expert_feed_forward_length")}
        shape |= {"shared_size": entries.whole("expert_shared_feed_forward_length"), "shared_gate": False}
        shape |= {"renormalise": entries.flag("expert_weights_norm", False), "sigmoid_gates": True}
        shape |= {"choice_bias": True, "gate_scale": entries.number("expert_weights_scale", 1.0)}
    is_recurrent = tuple(f"blk.{layer}.ssm_in.weight" in file.shapes for layer in range(layers))
    return NemotronHConfig(
        **shape,
        turns=("none",) * layers,
        activation="relu2",
        expert_layers=tuple(f"blk.{layer}.ffn_gate_inp.weight" in file.shapes for layer in range(layers)),
        is_attention=is_attention,
        is_recurrent=is_recurrent,
        recurrence=read_gguf_mamba2_shape(file, entries, sum(is_recurrent)),
    )


_TENSORS = GGUF_EXPERTS | gguf_mamba2("mixer.") | {"token_embd": "backbone.embeddings", "attn_norm": "norm"}
_TENSORS |= {"output_norm": "backbone.norm_f", "exp_probs_b.bias": "mlp.choice_bias.weight"}
_GGUF = GGUF(("nemotron_h", "nemotron_h_moe"), _read_gguf, _TENSORS, restored=RESTORED_MAMBA2)
_FAMILY = Family({"NemotronHForCausalLM": _DEFAULTS}, _read, NemotronHWeights, HybridRunner, _GGUF)
FAMILIES.register("nemotron_h", _FAMILY, "Nemotron-H and Nemotron 3, of layers that are attention, Mamba-2 or neither")
