"""Falcon-H1: attention and Mamba-2 beside each other in every layer, and multipliers of nearly all there is.

Multipliers of matrices are multiplied into them as they are read from a folder, in fp32, and rounded once; in GGUF
files they are in the matrices already.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyspec.architectures import FAMILIES, GGUF, Family, Unsupported
from pyspec.architectures.decoder import read_decoder
from pyspec.architectures.hybrid import HybridConfig
from pyspec.architectures.llama import DecoderLayer, LayerWeights, LlamaWeights
from pyspec.architectures.mamba import check_silu
from pyspec.architectures.mamba2 import (
    RESTORED_MAMBA2,
    Mamba2Part,
    check_no_limit,
    gguf_mamba2,
    read_gguf_mamba2_shape,
    read_mamba2_shape,
)
from pyspec.architectures.mixture import ExpertCheckpoint
from pyspec.architectures.shapes import DEFAULTS, GGUF_TENSORS, read_gguf_shape
from pyspec.architectures.weights import Blank
from pyspec.entries import Entries
from pyspec.ops.lay_out import StoredMatrix, stored_floats
from pyspec.ops.rms_norm import rms_norm
from pyspec.runners.recurrent import HybridRunner

if TYPE_CHECKING:
    from pyspec.checkpoints.gguf import GGUFFile

__all__ = []


@dataclass(frozen=True)
class FalconH1Config(HybridConfig):
    """The shape of a model.

    Attributes:
        multipliers: what a layer's tensors are multiplied by as they are read: the end of a tensor's name, factors, and
            of how many rows each; of all rows where there is one.
    """

    norm_names = {"attention": "input_layernorm", "feed_forward": "pre_ff_layernorm"}  # noqa: RUF012

    multipliers: tuple[tuple[str, tuple[float, ...], tuple[int, ...]], ...] = ()

    def kind_of(self, layer: int) -> type[DecoderLayer]:
        return ParallelLayer


@dataclass
class ParallelLayer(Mamba2Part, LayerWeights):
    """A layer with attention and a recurrence of Mamba-2, which take in the same rows; what they give is added."""

    MATRICES = (*Mamba2Part.RECURRENCE, *LayerWeights.MATRICES)

    @classmethod
    def empty_parts(cls, config: FalconH1Config, blank: Blank) -> dict[str, Any]:
        return super().empty_parts(config, blank) | cls.empty_recurrence(config.recurrence, blank)

    def named(self, config: FalconH1Config, prefix: str) -> dict[str, Tensor]:
        return super().named(config, prefix) | self.named_recurrence(f"{prefix}mamba.")

    def compute(self, config: FalconH1Config) -> None:
        super().compute(config)
        self.compute_recurrence(config.recurrence)

    def mix(self, x: Tensor, config: FalconH1Config, cache, place: int, numbers) -> Tensor:
        recurred = self.recur(x, config.recurrence, cache.layer(place), numbers.round)
        return rms_norm(super().mix(x, config, cache, place, numbers), None, 0.0, delta=recurred)  # their sum


class FalconH1Weights(LlamaWeights):
    """All weights, by the names of Hugging Face's Bamba."""

    NORM = "model.final_layernorm.weight"

    @staticmethod
    def checkpoint(stored, config: FalconH1Config) -> FalconH1Checkpoint:
        return FalconH1Checkpoint(stored, config)


class FalconH1Checkpoint(ExpertCheckpoint):
    """A checkpoint of Falcon-H1, whose tensors are multiplied by what its configuration has for them."""

    NAMES = ((r"\.feed_forward\.", ".mlp."),)

    def __init__(self, stored, config: FalconH1Config):
        super().__init__(stored)
        self._multipliers = {end: (torch.tensor(of), torch.tensor(rows)) for end, of, rows in config.multipliers}

    def blocks(self, name: str) -> Iterator[tuple[Tensor | slice, Tensor]]:
        factors = self._factors(name)
        for rows, values in super().blocks(name):
            of_rows = factors if factors is None or factors.numel() == 1 else factors[rows]
            yield rows, values if of_rows is None else values * of_rows.view(-1, *[1] * (values.dim() - 1))

    def stored(self, name: str) -> StoredMatrix | None:
        if self._factors(name) is None:
            return super().stored(name)
        values = torch.empty(self.shapes[name])
        for rows, part in self.blocks(name):
            values[rows] = part.float()
        return stored_floats(values)

    def _factors(self, name: str) -> Tensor | None:
        """fp32 [1] or [rows]."""
        found = next((of for end, of in self._multipliers.items() if name.endswith(end)), None)
        if found is None:
            return None
        factors, rows = found
        return factors.repeat_interleave(rows) if len(rows) else factors


# ==== config.json ====

_DEFAULTS = DEFAULTS | {"vocab_size": 128000, "intermediate_size": 14336, "num_key_value_heads": 8}
_DEFAULTS |= {"rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "mamba_d_ssm": 1024, "mamba_n_heads": 128}
_DEFAULTS |= {"mamba_n_groups": 1, "mamba_d_state": 256, "mamba_d_conv": 4, "mamba_expand": 2}
_DEFAULTS |= {"mamba_conv_bias": True, "mamba_proj_bias": False, "mamba_norm_before_gate": True}
_DEFAULTS |= {"mamba_rms_norm": False, "projectors_bias": False, "lm_head_multiplier": 1.0}
_DEFAULTS |= {"embedding_multiplier": 1.0, "key_multiplier": 1.0, "attention_out_multiplier": 1.0}
_DEFAULTS |= {"attention_in_multiplier": 1.0, "ssm_in_multiplier": 1.0, "ssm_out_multiplier": 1.0}


def _read(source: Path | str, entries: Entries, architecture: str) -> FalconH1Config:
    check_silu(source, entries, "HybridRunner")
    check_no_limit(source, entries, "HybridRunner")
    shape = read_decoder(source, entries, architecture)
    shape["architecture"] = entries.text("model_type", "falcon_h1")
    layers, has_bias = shape["layers"], entries.flag("mamba_proj_bias")
    if entries.flag("projectors_bias") != has_bias:
        raise Unsupported(f"{source} has projectors_bias {not has_bias}, HybridRunner has it like mamba_proj_bias")
    order = "norm first" if entries.flag("mamba_norm_before_gate") else "norm last"
    channels = None if entries.is_null("mamba_d_ssm") else entries.whole("mamba_d_ssm")
    order = order if entries.flag("mamba_rms_norm") else "no norm"
    recurrence = read_mamba2_shape(entries, layers, shape["norm_epsilon"], channels, gate_order=order)
    return FalconH1Config(
        **shape,
        embedding_scale=entries.number("embedding_multiplier"),
        logits_scale=entries.number("lm_head_multiplier"),
        is_attention=(True,) * layers,
        is_recurrent=(True,) * layers,
        recurrence=recurrence,
        multipliers=_read_multipliers(entries, recurrence),
    )


def _read_multipliers(entries: Entries, recurrence) -> tuple[tuple[str, tuple[float, ...], tuple[int, ...]], ...]:
    def several(key: str, count: int) -> tuple[float, ...]:
        values = entries.array(key, (int, float), [1.0] * count)
        if len(values) != count:
            raise entries.wrong(key, values, f"{count} numbers")
        return tuple(map(float, values))

    names = ("attention_in_multiplier", "attention_out_multiplier", "key_multiplier", "ssm_in_multiplier")
    taken, given, keys, recurred = map(entries.number, names)
    gates, down = several("mlp_multipliers", 2)
    states = recurrence.groups * recurrence.state_size
    sizes, parts = (*[recurrence.channels] * 2, states, states, recurrence.heads), several("ssm_multipliers", 5)
    found = [
        ("self_attn.q_proj.weight", (taken,), ()),
        ("self_attn.k_proj.weight", (taken * keys,), ()),
        ("self_attn.k_proj.bias", (keys,), ()),
        ("self_attn.v_proj.weight", (taken,), ()),
        ("self_attn.o_proj.weight", (given,), ()),
        ("self_attn.o_proj.bias", (given,), ()),
        ("mlp.gate_proj.weight", (gates,), ()),
        ("mlp.down_proj.weight", (down,), ()),
        ("mamba.in_proj.weight", tuple(recurred * part for part in parts), sizes),
        ("mamba.in_proj.bias", parts, sizes),
        ("mamba.out_proj.weight", (entries.number("ssm_out_multiplier"),), ()),
        ("mamba.out_proj.bias", (entries.number("ssm_out_multiplier"),), ()),
    ]
    return tuple(entry for entry in found if set(entry[1]) != {1.0})


# ==== GGUF ====


def _read_gguf(file: GGUFFile, entries: Entries) -> FalconH1Config:
    """The shape of the model in a GGUF file, as llama.cpp reads it."""
    shape = read_gguf_shape(file, entries)
    recurrence = read_gguf_mamba2_shape(file, entries, shape["layers"])
    everywhere = (True,) * shape["layers"]
    return FalconH1Config(**shape, is_attention=everywhere, is_recurrent=everywhere, recurrence=recurrence)


_TENSORS = GGUF_TENSORS | gguf_mamba2("mamba.") | {"output_norm": "model.final_layernorm"}
_TENSORS |= dict.fromkeys(("ffn_norm", "ffn_norm.weight"), "pre_ff_layernorm.weight")
_GGUF = GGUF(("falcon-h1",), _read_gguf, _TENSORS, restored=RESTORED_MAMBA2)
_FAMILY = Family({"FalconH1ForCausalLM": _DEFAULTS}, _read, FalconH1Weights, HybridRunner, _GGUF)
FAMILIES.register("falcon_h1", _FAMILY, "Falcon-H1, attention and Mamba-2 beside each other")
