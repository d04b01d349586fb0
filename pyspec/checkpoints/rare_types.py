"""Types of GGUF tensors that no format of ours is made for: written as the nearest one.

The codebooks of IQ1 to IQ3 have few integers, which stand in q6_k: their values are a factor of 256 inputs, times a
small integer of 16 or 32, times one of these. Only those of IQ2 (8, 25, 43) are too far apart for 6 bits and become 6,
18, 31, of which no value is off by more than 4%. The three values of TQ1 and TQ2 stand in q2_k. NVFP4's scales of 16
inputs become integers of a power of two, exactly where none is below an eighth of its block's largest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyspec.ops.weight_formats import FORMATS, Codes

__all__ = ["RARE_TYPES", "write_codes"]

_IQ2_STEP = (8 * 6 + 25 * 18 + 43 * 31) / (6**2 + 18**2 + 31**2)  # of least squares


@dataclass(frozen=True)
class RareType:
    """How a type is written.

    Attributes:
        format: name of the format.
        block: inputs of a block of the type.
        scales: of blocks of bytes, uint8 [N, B, bytes]: the values' factors, fp32 [N, K / 256], and the integers of
            groups, [N, K / 16], that both say what a level is worth.
        is_exact: whether no value changes.
    """

    format: str
    block: int
    scales: Callable[[Tensor], tuple[Tensor, Tensor]]
    is_exact: bool


def write_codes(kind: str, data: Tensor, values: Tensor) -> Codes:
    """Rows of a tensor in the format of its type.

    Args:
        kind: a key of RARE_TYPES.
        data: uint8 [N, bytes of a row].
        values: fp32 [N, K], what data stand for; K whole blocks of 256.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    if not values.isfinite().all():
        raise ValueError("source has values that are NaN or infinite")
    rare = RARE_TYPES[kind]
    format = FORMATS[rare.format]
    outputs, inputs = values.shape
    blocks = data.view(outputs, inputs // rare.block, -1)
    factors, scales = rare.scales(blocks)
    worth = factors.repeat_interleave(format.block // format.group, 1) * scales
    worth = torch.where(worth == 0, torch.inf, worth)
    levels = (values.unflatten(1, (-1, format.group)) / worth[..., None]).round_().flatten(1)
    factors, scales = factors.half(), scales.to(torch.int8)
    floors = {"floors": factors, "minimums": scales.view(torch.uint8)} if format.has_floors else {}
    lowest = -1 if floors else format.levels[0]
    return Codes(format, outputs, inputs, (levels - lowest).to(torch.uint8), factors, scales, **floors)


def _half(data: Tensor) -> Tensor:
    return data.contiguous().view(torch.float16).squeeze(-1).float()


def _nibbles(data: Tensor) -> Tensor:
    return torch.stack((data & 15, data >> 4), -1).flatten(-2)


def _odd(scales: Tensor, repeats: int) -> Tensor:
    """2 scale + 1 of each 16 inputs, [N, K / 16], of scales [N, B, n]."""
    return (2 * scales + 1).repeat_interleave(repeats, -1).flatten(1)


def _iq(step: float, groups: Callable[[Tensor], Tensor]) -> Callable:
    """Of types whose factor comes first."""

    def scales(data: Tensor) -> tuple[Tensor, Tensor]:
        integers = groups(data)
        return _half(data[..., :2]) * step, _odd(integers, 16 // integers.shape[-1])

    return scales


def _iq1_m(data: Tensor) -> tuple[Tensor, Tensor]:
    """The factor lies in the highest four bits of each of four words; below are four scales of three bits."""
    words = data[..., 48:56].contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
    bits = (words >> 12 << torch.arange(0, 16, 4, dtype=torch.int32, device="cpu")).sum(-1)
    factors = bits.to(torch.int16).view(torch.float16).float() / 8
    scales = words[..., None] >> torch.arange(0, 12, 3, dtype=torch.int32, device="cpu") & 7
    return factors, _odd(scales.flatten(2), 1)


def _tq(place: int) -> Callable:
    def scales(data: Tensor) -> tuple[Tensor, Tensor]:
        factors = _half(data[..., place : place + 2])
        return factors, torch.ones(len(factors), factors.shape[1] * 16, dtype=torch.int32, device="cpu")

    return scales


def _nvfp4(data: Tensor) -> tuple[Tensor, Tensor]:
    """The largest scale of 256 inputs becomes an integer from 64 to 120."""
    scales = data[..., :4].contiguous().view(torch.float8_e4m3fn).float().flatten(1) / 2
    largest = scales.unflatten(1, (-1, 16)).amax(-1)
    factors = torch.where(largest > 0, torch.exp2(largest.log2().floor() - 6), 0)
    integers = scales / torch.where(factors == 0, torch.inf, factors).repeat_interleave(16, 1)
    return factors, integers.round().to(torch.int32)


RARE_TYPES = {
    "iq1_s": RareType("q6_k", 256, _iq(1 / 8, lambda data: data[..., 35::2] >> 4 & 7), True),
    "iq1_m": RareType("q6_k", 256, _iq1_m, True),
    "iq2_xxs": RareType("q6_k", 256, _iq(_IQ2_STEP / 8, lambda data: data[..., 9::8] >> 4), False),
    "iq2_xs": RareType("q6_k", 256, _iq(_IQ2_STEP / 8, lambda data: _nibbles(data[..., 66:])), False),
    "iq2_s": RareType("q6_k", 256, _iq(_IQ2_STEP / 8, lambda data: _nibbles(data[..., 74:])), False),
    "iq3_xxs": RareType("q6_k", 256, _iq(1 / 2, lambda data: data[..., 69::4] >> 4), True),
    "iq3_s": RareType("q6_k", 256, _iq(1.0, lambda data: _nibbles(data[..., 106:])), True),
    "tq1_0": RareType("q2_k", 256, _tq(52), True),
    "tq2_0": RareType("q2_k", 256, _tq(64), True),
    "nvfp4": RareType("q6_k", 64, _nvfp4, False),
}
