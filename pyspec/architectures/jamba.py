"""Jamba: attention and Mamba with norms of dt, B and C, and experts in some layers. Nothing turns with positions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pyspec.architectures import FAMILIES, GGUF, Family
from pyspec.architectures.hybrid import HybridConfig, RecurrentLayer, read_gguf_kinds
from pyspec.architectures.llama import DecoderLayer, LayerWeights
from pyspec.architectures.mamba import MambaCheckpoint, MambaShape, NormedMambaPart, check_silu, read_dt_rank
from pyspec.architectures.mixture import (
    GGUF_EXPERTS,
    ExpertCheckpoint,
    ExpertPart,
    MixtureConfig,
    MixtureLayer,
    MixtureWeights,
    read_choices,
    read_gguf_choices,
)
from pyspec.architectures.shapes import DEFAULTS, GGUF_RECURRENT, read_shape
from pyspec.architectures.weights import Blank
from pyspec.entries import Entries
from pyspec.runners.recurrent import HybridRunner

if TYPE_CHECKING:
    from pyspec.checkpoints.gguf import GGUFFile

__all__ = []


@dataclass
class MambaLayer(NormedMambaPart, RecurrentLayer):
    """A layer with a recurrence of Mamba, whose norms have weights."""

    MATRICES = (*NormedMambaPart.RECURRENCE, *DecoderLayer.MATRICES)

    low_norm: Tensor  # [dt_rank]
    BC_norm: Tensor  # [2, state_size]

    @classmethod
    def empty_recurrence(cls, shape: MambaShape, blank: Blank) -> dict[str, Any]:
        norms = {"low_norm": blank.vector(shape.dt_rank), "BC_norm": blank.vector(2, shape.state_size)}
        return super().empty_recurrence(shape, blank) | norms

    def named_recurrence(self, prefix: str) -> dict[str, Tensor]:
        names = ("dt_layernorm", "b_layernorm", "c_layernorm")
        norms = zip(names, (self.low_norm, *self.BC_norm), strict=True)
        tensors = {name: of for name, of in super().named_recurrence(prefix).items() if not name.endswith("_norm")}
        return tensors | {f"{prefix}{name}.weight": norm for name, norm in norms}

    def computed(self, shape: MambaShape) -> dict[str, Tensor]:
        return super().computed(shape) | {"low_norm": self.low_norm, "BC_norm": self.BC_norm}


@dataclass
class MambaMixtureLayer(ExpertPart, MambaLayer):
    """A layer with a recurrence of Mamba and experts."""


@dataclass(frozen=True)
class JambaConfig(HybridConfig, MixtureConfig):
    """The shape of a model."""

    norm_names = {"attention": "input_layernorm", "feed_forward": "pre_ff_layernorm"}  # noqa: RUF012

    def kind_of(self, layer: int) -> type[DecoderLayer]:
        if self.expert_layers[layer]:
            return MixtureLayer if self.is_attention[layer] else MambaMixtureLayer
        return LayerWeights if self.is_attention[layer] else MambaLayer


class JambaWeights(MixtureWeights):
    """All weights, by the names of Hugging Face's Qwen3 MoE."""

    NORM = "model.final_layernorm.weight"

    @staticmethod
    def checkpoint(stored, config: JambaConfig) -> JambaCheckpoint:
        return JambaCheckpoint(stored, config.recurrence)


class JambaCheckpoint(MambaCheckpoint):
    """A checkpoint of Jamba, see MambaCheckpoint."""

    NAMES = ((r"\.feed_forward\.", ".mlp."), *ExpertCheckpoint.NAMES)


# ==== config.json ====

_DEFAULTS = DEFAULTS | {"vocab_size": 65536, "intermediate_size": 14336, "num_key_value_heads": 8}
_DEFAULTS |= {"rms_norm_eps": 1e-6, "max_position_embeddings": 262144, "num_experts_per_tok": 2, "num_experts": 16}
_DEFAULTS |= {"expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 8, "attn_layer_offset": 4}
_DEFAULTS |= {"mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_conv_bias": True}
_DEFAULTS |= {"mamba_proj_bias": False}


def _read(source: Path | str, entries: Entries, architecture: str) -> JambaConfig:
    check_silu(source, entries, "HybridRunner")
    shape = read_shape(source, entries, architecture)
    layers, hidden = shape["layers"], shape["hidden_size"]

    def every(kind: str) -> tuple[bool, ...]:
        period = entries.whole(f"{kind}_layer_period")
        offset = entries.whole(f"{kind}_layer_offset", least=0, most=period - 1)
        return tuple(layer % period == offset for layer in range(layers))

    is_attention, expert_layers, choices = every("attn"), (False,) * layers, {}
    if entries.whole("num_experts") > 1:
        expert_layers, choices = every("expert"), read_choices(entries)
    recurrence = MambaShape(
        hidden_size=hidden,
        layers=is_attention.count(False),
        channels=entries.whole("mamba_expand") * hidden,
        state_size=entries.whole("mamba_d_state"),
        dt_rank=read_dt_rank(entries, "mamba_dt_rank", hidden),
        conv_taps=entries.whole("mamba_d_conv"),
        projection_bias=entries.flag("mamba_proj_bias"),
        conv_bias=entries.flag("mamba_conv_bias"),
        inner_epsilon=shape["norm_epsilon"],
    )
    return JambaConfig(
        **shape,
        **choices,
        rope_base=10000.0,
        turns=("none",) * layers,
        expert_size=shape["intermediate_size"],
        expert_layers=expert_layers,
        is_attention=is_attention,
        recurrence=recurrence,
    )


# ==== GGUF ====


def _read_gguf(file: GGUFFile, entries: Entries) -> JambaConfig:
    """The shape of the model in a GGUF file, as llama.cpp reads it: its tensors say where experts are."""
    shape, is_attention = read_gguf_kinds(file, entries)
    layers, ends = shape["layers"], {name.split(".", 2)[-1] for name in file.shapes}
    expert_layers = tuple(f"blk.{layer}.ffn_gate_inp.weight" in file.shapes for layer in range(layers))
    if any(expert_layers):
        shape |= read_gguf_choices(entries) | {"expert_size": shape["intermediate_size"]}
    recurrence = MambaShape(
        hidden_size=shape["hidden_size"],
        layers=is_attention.count(False),
        channels=entries.whole("ssm.inner_size"),
        state_size=entries.whole("ssm.state_size"),
        dt_rank=entries.whole("ssm.time_step_rank"),
        conv_taps=entries.whole("ssm.conv_kernel"),
        projection_bias="ssm_in.bias" in ends,
        conv_bias="ssm_conv1d.bias" in ends,
        inner_epsilon=shape["norm_epsilon"],
    )
    own = {"turns": ("none",) * layers, "expert_layers": expert_layers}
    return JambaConfig(**shape, **own, is_attention=is_attention, recurrence=recurrence)


_TENSORS = GGUF_EXPERTS | {"output_norm": "model.final_layernorm", "ffn_norm": "pre_ff_layernorm"}
_TENSORS |= {"ssm_in": "mamba.in_proj", "ssm_conv1d": "mamba.conv1d", "ssm_x": "mamba.x_proj", "ssm_a": "mamba.A_log"}
_TENSORS |= {"ssm_dt": "mamba.dt_proj", "ssm_d": "mamba.D", "ssm_out": "mamba.out_proj"}
_TENSORS |= {f"ssm_{name}_norm": f"mamba.{name}_layernorm" for name in ("dt", "b", "c")}
_GGUF = GGUF(("jamba",), _read_gguf, _TENSORS, restored=GGUF_RECURRENT)
_FAMILY = Family({"JambaForCausalLM": _DEFAULTS}, _read, JambaWeights, HybridRunner, _GGUF)
FAMILIES.register("jamba", _FAMILY, "Jamba, hybrids of attention and Mamba")
