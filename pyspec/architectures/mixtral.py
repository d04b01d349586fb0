"""Mixtral: Llama's layers with experts, of which a row goes to two."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pyspec.architectures import FAMILIES, GGUF, Family
from pyspec.architectures.mixture import GGUF_EXPERTS, MixtureConfig, MixtureWeights, read_choices, read_gguf_choices
from pyspec.architectures.rotary import read_rope
from pyspec.architectures.shapes import DEFAULTS, interleaved_rows, read_activation, read_gguf_shape, read_shape
from pyspec.entries import Entries
from pyspec.runners.attention import AttentionRunner

if TYPE_CHECKING:
    from pyspec.checkpoints.gguf import GGUFFile

__all__ = []

_DEFAULTS = DEFAULTS | {"vocab_size": 32000, "intermediate_size": 14336, "max_position_embeddings": 131072}
_DEFAULTS |= {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "num_experts": 8, "num_experts_per_tok": 2}


def _read(source: Path | str, entries: Entries, architecture: str) -> MixtureConfig:
    shape = read_shape(source, entries, architecture)
    shape["rope_base"], shape["rope_scaling"] = read_rope(source, entries, 1e6)
    window = entries.whole("sliding_window", least=0) if "sliding_window" in entries else 0
    return MixtureConfig(
        **shape,
        **read_choices(entries),
        expert_size=shape["intermediate_size"],
        renormalise=True,
        windows=(window or None,) * shape["layers"],
        activation=read_activation(source, entries),
    )


def _read_gguf(file: GGUFFile, entries: Entries) -> MixtureConfig:
    shape = read_gguf_shape(file, entries, is_mixture=True)
    choices = read_gguf_choices(entries)
    return MixtureConfig(**shape, **choices, expert_size=shape["intermediate_size"], renormalise=True)


_GGUF = GGUF(("mixtral",), _read_gguf, GGUF_EXPERTS, interleaved_rows)
_FAMILY = Family({"MixtralForCausalLM": _DEFAULTS}, _read, MixtureWeights, AttentionRunner, _GGUF)
FAMILIES.register("mixtral", _FAMILY, "Mixtral")
