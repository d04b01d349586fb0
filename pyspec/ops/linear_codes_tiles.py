"""How `linear` on a GPU reads weights in few bits: the layout of `Codes`, and back.

A tile is 128 outputs by four groups of 32 or 16 inputs, one piece of memory (kernels/triton/linear_codes.py streams
them). A group has as many inputs as share a scale, G:

    factors [outputs, of each block in the tile] and the same of floors; where the block is as long as the tile or
    longer, [outputs, (factor, floor)], again in each of its tiles
    scales [outputs, groups], uint8, 128 more than they are
    minimums [outputs, groups], uint8
    codes [outputs, G], 16 bits: of word j the bits 4 i to 4 i + 3 are those of the code of input G i + j
    high bits [outputs, G], 8 bits: of byte j the bits 2 i and 2 i + 1 are the next of that code

Scales, minimums and floors are left out where the format has none, floors where they are the factors (int4), and high
bits where codes have 4 or fewer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyspec.ops.weight_formats import Codes, WeightFormat

__all__ = [
    "GROUPS",
    "OUTPUTS",
    "group_inputs",
    "has_zero_points",
    "lay_out_tiles",
    "read_tiles",
    "tile_bytes",
    "tile_inputs",
]

OUTPUTS, GROUPS = 128, 4  # of a tile
LARGEST_MINIMUM = 127  # that the kernel can read


def group_inputs(format: WeightFormat) -> int:
    """Inputs that the kernel multiplies a scale with."""
    return min(format.group, 32)


def tile_inputs(format: WeightFormat) -> int:
    return GROUPS * group_inputs(format)


def has_zero_points(format: WeightFormat) -> bool:
    """Whether a floor is the factor: value = factor (level - minimum)."""
    return format.has_minimums and not format.has_scales


def has_short_floors(format: WeightFormat) -> bool:
    """Whether a tile has floors of their own, several for an output."""
    return format.has_floors and not has_zero_points(format) and format.block < tile_inputs(format)


def factor_bytes(format: WeightFormat) -> int:
    """Bytes of an output's factors in a tile, with the floor where there is one factor."""
    return max(2 * tile_inputs(format) // format.block, 4)


def tile_bytes(format: WeightFormat) -> int:
    factors = factor_bytes(format) * (2 if has_short_floors(format) else 1)
    return OUTPUTS * (factors + GROUPS * (format.has_scales + format.has_minimums) + _code_bytes(format))


def _code_bytes(format: WeightFormat) -> int:
    """Bytes of an output's codes in a tile."""
    return group_inputs(format) * (2 + (format.bits > 4))


def lay_out_tiles(codes: Codes) -> Tensor:
    """A weight in 2 to 6 bits as the GPU's kernel reads it: uint8 [panels of outputs, tiles of inputs, tile_bytes].

    Raises:
        ValueError: the format has more bits, a minimum is above 127, or (int4) floors are not the factors.
    """
    format = codes.format
    if format.bits > 6:
        raise ValueError(f"format must have at most 6 bits for the tiles of a GPU, got {format.name}")
    if codes.minimums is not None and codes.minimums.max() > LARGEST_MINIMUM:
        raise ValueError(f"minimums must be at most {LARGEST_MINIMUM}, got {codes.minimums.max().item()}")
    if has_zero_points(format) and not torch.equal(codes.floors, codes.factors):
        raise ValueError(f"floors must be the factors for {format.name}")
    inputs = tile_inputs(format)
    if format.block < inputs:
        halves = [codes.factors, codes.floors] if has_short_floors(format) else [codes.factors]
        halves = [_tiles(part, inputs // format.block) for part in halves]
    else:
        floors = torch.zeros_like(codes.factors) if codes.floors is None else codes.floors
        both = torch.stack((codes.factors, floors), 2).repeat_interleave(format.block // inputs, 1)
        halves = [_tiles(both.flatten(1), 2)]
    bytes_ = [part.view(torch.uint8).flatten(2) for part in halves]
    repeated = format.group // group_inputs(format)
    if codes.scales is not None:
        bytes_.append(_tiles(codes.scales.view(torch.uint8) ^ 128, GROUPS).flatten(2))
    if codes.minimums is not None:
        bytes_.append(_tiles(codes.minimums.repeat_interleave(repeated, 1), GROUPS).flatten(2))
    planes = _tiles(codes.codes, inputs).unflatten(3, (GROUPS, -1)).unbind(3)  # four of [P, T, 128, G]
    a, b, c, d = (plane & 15 for plane in planes)
    bytes_.append(torch.stack((a | b << 4, c | d << 4), -1).flatten(2))
    if format.bits > 4:
        a, b, c, d = (plane >> 4 for plane in planes)
        bytes_.append((a | b << 2 | c << 4 | d << 6).flatten(2))
    return torch.cat(bytes_, 2)


def _tiles(part: Tensor, wide: int) -> Tensor:
    """[outputs, any] filled up with zeros and cut to [panels, tiles, OUTPUTS, wide], contiguous."""
    part = F.pad(part, (0, -part.shape[1] % wide, 0, -part.shape[0] % OUTPUTS))
    return part.unflatten(1, (-1, wide)).unflatten(0, (-1, OUTPUTS)).transpose(1, 2).contiguous()


def read_tiles(data: Tensor, format: WeightFormat, inputs: int, index: Tensor) -> Codes:
    """The outputs of `index` [n] of a laid out weight, taken apart again."""
    panel, output = index // OUTPUTS, index % OUTPUTS
    at = 0

    def take(bytes_: int) -> Tensor:
        nonlocal at
        part = data[..., at : at + OUTPUTS * bytes_].unflatten(2, (OUTPUTS, bytes_))
        at += OUTPUTS * bytes_
        return part[panel, :, output]  # [n, T, bytes]

    scales = floors = minimums = None
    factors = take(factor_bytes(format)).view(format.factor_dtype)
    if format.block >= tile_inputs(format):  # of a factor and a floor for each tile
        factors, floors = factors[:, :: format.block // tile_inputs(format)].unbind(2)
    factors = factors.flatten(1)
    if has_zero_points(format):
        floors = factors
    elif has_short_floors(format):
        floors = take(factor_bytes(format)).view(format.factor_dtype).flatten(1)
    elif not format.has_floors:
        floors = None
    width = group_inputs(format)
    if format.has_scales:
        scales = (take(GROUPS) ^ 128).view(torch.int8).flatten(1)
    if format.has_minimums:
        minimums = take(GROUPS).flatten(1)[:, :: format.group // width]
    words = take(2 * width).unflatten(2, (width, 2))  # [n, T, G, low and high]
    codes = torch.stack((words & 15, words >> 4), -1).flatten(3)
    if format.bits > 4:
        highs = take(width)
        codes = codes | torch.stack([highs >> shift & 3 for shift in (0, 2, 4, 6)], -1) << 4
    codes = codes.transpose(2, 3).flatten(1)
    return Codes(format, len(index), inputs, codes, factors, scales, floors, minimums)
