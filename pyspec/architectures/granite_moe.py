"""Granite 3 MoE: Granite's layers with experts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pyspec.architectures import FAMILIES, GGUF, Family, Unsupported
from pyspec.architectures.decoder import read_decoder
from pyspec.architectures.granite import DEFAULTS_3, read_gguf_multipliers, read_multipliers
from pyspec.architectures.mixture import GGUF_EXPERTS, MixtureConfig, MixtureWeights, read_choices, read_gguf_choices
from pyspec.architectures.shapes import interleaved_rows, read_gguf_shape
from pyspec.entries import Entries
from pyspec.runners.attention import AttentionRunner

if TYPE_CHECKING:
    from pyspec.checkpoints.gguf import GGUFFile

__all__ = []

_DEFAULTS = DEFAULTS_3 | {"num_experts": 8, "num_experts_per_tok": 2}


def _read(source: Path | str, entries: Entries, architecture: str) -> MixtureConfig:
    shape = read_decoder(source, entries, architecture) | read_multipliers(entries) | read_choices(entries)
    return MixtureConfig(**shape, expert_size=shape["intermediate_size"], renormalise=True)


def _read_gguf(file: GGUFFile, entries: Entries) -> MixtureConfig:
    if entries.whole("expert_shared_feed_forward_length", 0, least=0):
        raise Unsupported(f"{file.path} has an expert of all rows, which our kernels of Granite do not have")
    shape = read_gguf_shape(file, entries, is_mixture=True)
    shape |= read_gguf_multipliers(entries, shape) | read_gguf_choices(entries)
    return MixtureConfig(**shape, expert_size=shape["intermediate_size"], renormalise=True)


_GGUF = GGUF(("granitemoe",), _read_gguf, GGUF_EXPERTS, interleaved_rows)
_FAMILY = Family({"GraniteMoeForCausalLM": _DEFAULTS}, _read, MixtureWeights, AttentionRunner, _GGUF)
FAMILIES.register("granite_moe", _FAMILY, "Granite 3 MoE")
