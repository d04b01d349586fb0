"""Rotary positions: what checkpoints say of their frequencies, and the table of angles that kernels read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pyspec.architectures import Unsupported
from pyspec.entries import Entries

if TYPE_CHECKING:
    from pyspec.checkpoints.gguf import GGUFFile

__all__ = [
    "LongScaling",
    "Rope",
    "RopeScaling",
    "YarnScaling",
    "read_gguf_scaling",
    "read_local_rope",
    "read_long",
    "read_rope",
    "read_scaling",
    "rope_entries",
    "rope_frequencies",
    "rope_table",
]


class Rope(NamedTuple):
    """What a layer's queries and keys are turned by, as rotary_write takes it.

    Attributes:
        cos_sin: [positions, 2, width / 2] fp32, cosines and sines.
        query_scales: [positions] fp32, what queries are multiplied by; None for 1.
    """

    cos_sin: Tensor
    query_scales: Tensor | None = None


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context of the first training.

    "linear" divides all of them by factor; "llama3" leaves wavelengths below original_context / high_factor,
    divides those above original_context / low_factor and blends between; "table" divides each by its own and by factor.
    """

    magnitude = 1.0  # of cosines and sines
    switch = None  # tokens of a text from which on others take the place of all its frequencies

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


@dataclass(frozen=True)
class YarnScaling(RopeScaling):
    """YaRN: dimensions that turn more than `fast` times in the original context keep their frequency, those that turn
    less than `slow` times have it divided by factor, with a ramp over the dimensions between.

    magnitude multiplies cosines and sines; truncate takes the ramp's ends to whole dimensions.
    """

    fast: float = 32.0
    slow: float = 1.0
    truncate: bool = True
    magnitude: float = 1.0

    def scaled(self, frequencies: Tensor) -> Tensor:
        step = -math.log(frequencies[1])  # of the logarithms, which are a line
        ends = [math.log(self.original_context / (turns * 2 * math.pi)) / step for turns in (self.fast, self.slow)]
        low, high = (math.floor(ends[0]), math.ceil(ends[1])) if self.truncate else ends
        low, high = max(low, 0), min(high, 2 * len(frequencies) - 1)
        ramp = (torch.arange(len(frequencies), device="cpu") - low) / (high - low if high != low else 0.001)
        kept = 1 - ramp.clamp(0, 1)
        return frequencies / self.factor * (1 - kept) + frequencies * kept


@dataclass(frozen=True)
class LongScaling(RopeScaling):
    """longrope: texts of up to original_context tokens have frequencies divided by `table`, longer ones by `long`.

    magnitude multiplies cosines and sines.
    """

    long: tuple[float, ...] = ()
    magnitude: float = 1.0

    @property
    def switch(self) -> int:
        return self.original_context

    def scaled(self, frequencies: Tensor) -> Tensor:
        return frequencies / torch.tensor(self.table, dtype=torch.float32, device="cpu")

    def scaled_long(self, frequencies: Tensor) -> Tensor:
        """Frequencies [width / 2] fp32 of texts behind the switch."""
        return frequencies / torch.tensor(self.long, dtype=torch.float32, device="cpu")


def rope_frequencies(base: float, width: int, scaling: RopeScaling | None) -> Tensor:
    """Radians per position, [width / 2] fp32, of dimensions of a head that are turned."""
    exponents = torch.arange(0, width, 2, dtype=torch.int64, device="cpu").float() / width
    frequencies = 1.0 / base**exponents
    return frequencies if scaling is None else scaling.scaled(frequencies)


def rope_table(frequencies: Tensor, positions: int, device: torch.device, magnitude: float = 1.0) -> Tensor:
    """Cosines and sines [positions, 2, head_dim / 2] fp32, as rotary_write takes them."""
    angles = torch.arange(positions, dtype=torch.float32, device="cpu")[:, None] * frequencies
    table = torch.stack((angles.cos(), angles.sin()), 1)
    return (table if magnitude == 1 else table * magnitude).to(device)


def read_rope(
    source: Path | str, entries: Entries, theta: float = 10000.0, *, in_part: bool = False
) -> tuple[float, RopeScaling | None]:
    """The base of rotary frequencies, theta where it is left out, and their scaling; in_part for heads so turned.

    Of what a file may say twice, transformers obeys rope_scaling and then forgets rope_parameters, its base too; an
    entry inside of the two before one outside; rope_type before type. The length of the first training is the other
    way round: outside before inside.
    """
    rope = rope_entries(entries)
    theta = rope.number("rope_theta", entries.number("rope_theta", theta))
    if any(isinstance(value, dict) for value in rope.values()):
        raise Unsupported(f"{source} has rope parameters for each kind of layers, which this family does not have")
    scaling = read_scaling(source, entries, rope)
    part = rope.number("partial_rotary_factor", entries.number("partial_rotary_factor", 1.0))
    if scaling is not None and part != 1 and not in_part:
        raise Unsupported(f"{source} has partial_rotary_factor {part}, this family turns all of a head")
    return theta, scaling


def read_local_rope(
    source: Path | str, entries: Entries, theta: float, local_theta: float, local_key: str = ""
) -> tuple[float, RopeScaling | None, float]:
    """The base and the scaling of layers without a window, and the base of those with one, which have no scaling.

    rope_parameters has entries for each kind of layers; older files have rope_scaling and rope_theta for those without
    a window, and the other base by the name local_key.
    """
    stated = entries.part("rope_parameters")
    full, local, scaling = stated.part("full_attention"), stated.part("sliding_attention"), entries.part("rope_scaling")
    if (kind := local.text("rope_type", local.text("type", "default"))) != "default":
        raise Unsupported(f"{source} has rope scaling {kind!r} for layers with a window, AttentionRunner has none")
    if any(isinstance(value, dict) for value in scaling.values()):
        raise Unsupported(
            f"{source} has rope_scaling for each kind of layers, AttentionRunner has it in rope_parameters"
        )
    theta = scaling.number("rope_theta", full.number("rope_theta", entries.number("rope_theta", theta)))
    local_theta = entries.number(local_key, local_theta) if local_key else local_theta
    rope = scaling if scaling.values() else full
    return theta, read_scaling(source, entries, rope), local.number("rope_theta", local_theta)


def read_scaling(source: Path | str, entries: Entries, rope: Entries) -> RopeScaling | None:
    """The scaling that a rope's entries state."""
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind in ("default", "dynamic"):  # which begins behind the context
        return None
    if kind not in ("linear", "llama3", "yarn"):
        raise Unsupported(f"{source} has rope scaling {kind!r}, this family has linear, llama3, yarn and dynamic")
    original = entries if "original_max_position_embeddings" in entries else rope
    context = entries.whole("max_position_embeddings")
    if kind == "yarn":
        return _read_yarn(rope, original.whole("original_max_position_embeddings", context), context)
    factor = rope.number("factor")
    if kind == "linear":
        return RopeScaling("linear", factor=factor)
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if low >= high:
        raise Unsupported(
            f"{source} has low_freq_factor {low} and high_freq_factor {high}, AttentionRunner needs less and more"
        )
    return RopeScaling(
        "llama3",
        factor=factor,
        low_factor=low,
        high_factor=high,
        original_context=original.whole("original_max_position_embeddings", context),
    )


def read_long(rope: Entries, original: int, context: int) -> LongScaling:
    """longrope as a rope's entries state it, of a model for so many tokens."""
    factor = rope.number("factor", context / original)
    growth = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    tables = {}
    for ours, theirs in (("table", "short_factor"), ("long", "long_factor")):
        values = rope.array(theirs, (int, float))
        if not values or not all(0 < value < math.inf for value in values):
            raise rope.wrong(theirs, values, "numbers above 0")
        tables[ours] = tuple(map(float, values))
    magnitude = rope.number("attention_factor", growth)
    return LongScaling("longrope", original_context=original, magnitude=magnitude, **tables)


def _read_yarn(rope: Entries, original: int, context: int) -> YarnScaling:
    factor = rope.number("factor", context / original)

    def growth(share: float) -> float:
        return 0.1 * share * math.log(factor) + 1.0 if factor > 1 else 1.0

    magnitude = growth(1.0)
    if "mscale" in rope and "mscale_all_dim" in rope:
        magnitude = growth(rope.number("mscale")) / growth(rope.number("mscale_all_dim"))
    return YarnScaling(
        "yarn",
        factor=factor,
        original_context=original,
        fast=rope.number("beta_fast", 32.0),
        slow=rope.number("beta_slow", 1.0),
        truncate=rope.flag("truncate", True),
        magnitude=rope.number("attention_factor", magnitude),
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
    if "rope_factors_long.weight" in file.shapes:
        return _read_gguf_long(file, entries, head_dim)
    if kind not in ("none", "linear", "yarn"):
        raise Unsupported(f"{file.path} has rope scaling {kind!r}, supported are linear, llama3 and yarn")
    if kind == "yarn":
        return _read_gguf_yarn(file, entries, factor)
    if entries.number("rope.scaling.attn_factor", 1.0) != 1:
        raise Unsupported(
            f"{file.path} scales rotated queries and keys (rope.scaling.attn_factor), which is not supported"
        )
    factor = 1.0 if kind == "none" else factor
    if "rope_freqs.weight" not in file.shapes:
        return None if factor == 1 else RopeScaling("linear", factor=factor)
    return RopeScaling("table", factor=factor, table=_gguf_factors(file, "rope_freqs.weight", head_dim))


def _read_gguf_yarn(file: GGUFFile, entries: Entries, factor: float) -> YarnScaling:
    """YaRN; its magnitude is what yarn_attn_factor states, or else follows from the factor, and attn_factor on top."""
    if (extrapolation := entries.get("rope.scaling.yarn_ext_factor", 1.0)) != 1:
        raise Unsupported(f"{file.path} has rope.scaling.yarn_ext_factor {extrapolation}, which is not supported")
    growth = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    if factor > 1 and entries.get("rope.scaling.yarn_log_multiplier", 0) != 0:
        growth /= 0.1 * entries.number("rope.scaling.yarn_log_multiplier") * math.log(factor) + 1.0
    magnitude = entries.number("rope.scaling.yarn_attn_factor", growth)
    return YarnScaling(
        "yarn",
        factor=factor,
        original_context=entries.whole("rope.scaling.original_context_length", entries.whole("context_length")),
        fast=entries.number("rope.scaling.yarn_beta_fast", 32.0),
        slow=entries.number("rope.scaling.yarn_beta_slow", 1.0),
        magnitude=magnitude * entries.number("rope.scaling.attn_factor", 1.0),
    )


def _read_gguf_long(file: GGUFFile, entries: Entries, width: int) -> LongScaling:
    tables = [_gguf_factors(file, f"rope_factors_{name}.weight", width) for name in ("short", "long")]
    original = entries.whole("rope.scaling.original_context_length", entries.whole("context_length"))
    magnitude = entries.number("rope.scaling.attn_factor", 1.0)
    return LongScaling("longrope", original_context=original, table=tables[0], long=tables[1], magnitude=magnitude)


def _gguf_factors(file: GGUFFile, name: str, width: int) -> tuple[float, ...]:
    """A tensor of what each frequency is divided by."""
    if (shape := file.shapes.get(name)) != (width // 2,):
        raise ValueError(f"{file.path}: tensor {name} must have shape {(width // 2,)}, got {shape}")
    table = torch.cat(list(file.rows(name)))
    if not (table.isfinite() & (table > 0)).all():
        raise ValueError(f"{file.path}: tensor {name} must hold numbers above 0")
    return tuple(table.tolist())
