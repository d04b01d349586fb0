"""Rotary positions: what checkpoints say of their frequencies, and the table of angles that kernels read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyspec.architectures import Unsupported
from pyspec.entries import Entries

if TYPE_CHECKING:
    from pyspec.checkpoints.gguf import GGUFFile

__all__ = ["RopeScaling", "read_gguf_scaling", "read_rope", "rope_entries", "rope_table"]


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context of the first training.

    "linear" divides all of them by factor; "llama3" leaves wavelengths below original_context / high_factor,
    divides those above original_context / low_factor and blends between; "table" divides each by its own and by factor.
    """

    kind: str
    factor: float = 1.0
    low_factor: float = 1.0
    high_factor: float = 4.0
    original_context: int = 8192
    table: tuple[float, ...] = ()

    def scaled(self, frequencies: Tensor) -> Tensor:
        """Frequencies [head_dim / 2] fp32, stretched."""
        if self.kind == "table":
            return frequencies / torch.tensor(self.table, dtype=torch.float32, device="cpu") / self.factor
        if self.kind == "linear":
            return frequencies / self.factor
        wavelengths = 2 * math.pi / frequencies
        kept = (self.original_context / wavelengths - self.low_factor) / (self.high_factor - self.low_factor)
        kept = kept.clamp(0, 1)
        return kept * frequencies + (1 - kept) * frequencies / self.factor


def rope_table(frequencies: Tensor, positions: int, device: torch.device) -> Tensor:
    """Cosines and sines [positions, 2, head_dim / 2] fp32, as rotary_write takes them."""
    angles = torch.arange(positions, dtype=torch.float32, device="cpu")[:, None] * frequencies
    return torch.stack((angles.cos(), angles.sin()), 1).to(device)


def read_rope(source: Path | str, entries: Entries) -> tuple[float, RopeScaling | None]:
    """The base of rotary frequencies and their scaling.

    Of what a file may say twice, transformers obeys rope_scaling and then forgets rope_parameters, its base too; an
    entry inside of the two before one outside; rope_type before type. The length of the first training is the other
    way round: outside before inside.
    """
    rope = rope_entries(entries)
    theta = rope.number("rope_theta", entries.number("rope_theta", 10000.0))
    kind = rope.text("rope_type", rope.text("type", "default"))
    if any(isinstance(value, dict) for value in rope.values()):
        raise Unsupported(f"{source} has rope parameters of its own for kinds of layers, LlamaRunner has one for all")
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3"):
        raise Unsupported(f"{source} has rope scaling {kind!r}, LlamaRunner has linear and llama3")
    if (part := rope.number("partial_rotary_factor", entries.number("partial_rotary_factor", 1.0))) != 1:
        raise Unsupported(f"{source} has partial_rotary_factor {part}, LlamaRunner turns all of a head")
    factor = rope.number("factor")
    if kind == "linear":
        return theta, RopeScaling("linear", factor=factor)
    original = entries if "original_max_position_embeddings" in entries else rope
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if low >= high:
        raise Unsupported(
            f"{source} has low_freq_factor {low} and high_freq_factor {high}, LlamaRunner needs less and more"
        )
    return theta, RopeScaling(
        "llama3",
        factor=factor,
        low_factor=low,
        high_factor=high,
        original_context=original.whole("original_max_position_embeddings", entries.whole("max_position_embeddings")),
    )


def rope_entries(entries: Entries) -> Entries:
    """rope_scaling where it says something, else rope_parameters."""
    scaling = entries.part("rope_scaling")
    return scaling if scaling.values() else entries.part("rope_parameters")


def read_gguf_scaling(file: GGUFFile, entries: Entries, head_dim: int) -> RopeScaling | None:
    """Reads scaling as llama.cpp does: a factor without a type is linear, an old key may state it; the type none wins.

    The factor of each frequency that rope_freqs.weight holds comes on top.
    """
    kind = entries.text("rope.scaling.type", "linear")
    key = "rope.scaling.factor" if "rope.scaling.factor" in entries else "rope.scale_linear"
    factor = 1.0 if entries.get(key, 0) == 0 else entries.number(key)
    if kind not in ("none", "linear"):
        raise Unsupported(f"{file.path} has rope scaling {kind!r}, supported are linear and llama3")
    if entries.number("rope.scaling.attn_factor", 1.0) != 1:
        raise Unsupported(
            f"{file.path} scales rotated queries and keys (rope.scaling.attn_factor), which is not supported"
        )
    factor = 1.0 if kind == "none" else factor
    if (shape := file.shapes.get("rope_freqs.weight")) is None:
        return None if factor == 1 else RopeScaling("linear", factor=factor)
    if shape != (head_dim // 2,):
        raise ValueError(f"{file.path}: tensor rope_freqs.weight must have shape {(head_dim // 2,)}, got {shape}")
    table = torch.cat(list(file.rows("rope_freqs.weight")))
    if not (table.isfinite() & (table > 0)).all():
        raise ValueError(f"{file.path}: tensor rope_freqs.weight must hold numbers above 0")
    return RopeScaling("table", factor=factor, table=tuple(table.tolist()))
