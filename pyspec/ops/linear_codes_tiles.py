"""How `linear` on a GPU reads weights in 4 bits: the layout of `Codes`, and back.

A tile is 128 outputs by 128 inputs, one piece of memory (kernels/triton/linear_codes.py streams them):

    factors [outputs, of each block in the tile] and the same of floors; where the block is as long as the tile or
    longer, [outputs, (factor, floor)], again in each of its tiles
    scales [outputs, groups], uint8, 128 more than they are
    minimums [outputs, groups], uint8
    codes [outputs, 32], 16 bits: of word j the bits 4 i to 4 i + 3 are the code of input 32 i + j

Scales, minimums and floors are left out where the format has none, and floors where they are the factors (int4).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyspec.ops.weight_formats import Codes, WeightFormat

__all__ = ["GROUP", "INPUTS", "OUTPUTS", "has_zero_points", "lay_out_tiles", "read_tiles", "tile_bytes"]

OUTPUTS, INPUTS = 128, 128  # of a tile
GROUP = 32  # inputs that the kernel multiplies a scale with
GROUPS = INPUTS // GROUP
LARGEST_MINIMUM = 127  # that the kernel can read


def has_zero_points(format: WeightFormat) -> bool:
    """Whether a floor is the factor: value = factor (level - minimum)."""
    return format.has_minimums and not format.has_scales


def has_short_floors(format: WeightFormat) -> bool:
    """Whether a tile has floors of their own, several for an output."""
    return format.has_floors and not has_zero_points(format) and format.block < INPUTS


def factor_bytes(format: WeightFormat) -> int:
    """Bytes of an output's factors in a tile, with the floor where there is one factor."""
    return max(2 * INPUTS // format.block, 4)


def tile_bytes(format: WeightFormat) -> int:
    factors = factor_bytes(format) * (2 if has_short_floors(format) else 1)
    return OUTPUTS * (factors + GROUPS * (format.has_scales + format.has_minimums) + INPUTS // 2)


def lay_out_tiles(codes: Codes) -> Tensor:
    """A weight in 4 bits as the GPU's kernel reads it: uint8 [panels of outputs, tiles of inputs, tile_bytes].

    Raises:
        ValueError: the format does not have 4 bits, a minimum is above 127, or (int4) floors are not the factors.
    """
    format = codes.format
    if format.bits != 4:
        raise ValueError(f"format must have 4 bits for a GPU, got {format.name}")
    if codes.minimums is not None and codes.minimums.max() > LARGEST_MINIMUM:
        raise ValueError(f"minimums must be at most {LARGEST_MINIMUM}, got {codes.minimums.max().item()}")
    if has_zero_points(format) and not torch.equal(codes.floors, codes.factors):
        raise ValueError(f"floors must be the factors for {format.name}")
    if format.block < INPUTS:
        halves = [codes.factors, codes.floors] if has_short_floors(format) else [codes.factors]
        halves = [_tiles(part, INPUTS // format.block) for part in halves]
    else:
        floors = torch.zeros_like(codes.factors) if codes.floors is None else codes.floors
        both = torch.stack((codes.factors, floors), 2).repeat_interleave(format.block // INPUTS, 1)
        halves = [_tiles(both.flatten(1), 2)]
    bytes_ = [part.view(torch.uint8).flatten(2) for part in halves]
    repeated = max(format.group // GROUP, 1)
    if codes.scales is not None:
        bytes_.append(_tiles(codes.scales.view(torch.uint8) ^ 128, GROUPS).flatten(2))
    if codes.minimums is not None:
        bytes_.append(_tiles(codes.minimums.repeat_interleave(repeated, 1), GROUPS).flatten(2))
    planes = _tiles(codes.codes, INPUTS).unflatten(3, (GROUPS, GROUP))  # [P, T, 128, 4, 32]
    low, high = planes[..., 0, :] | planes[..., 1, :] << 4, planes[..., 2, :] | planes[..., 3, :] << 4
    return torch.cat((*bytes_, torch.stack((low, high), -1).flatten(2)), 2)


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
    if format.block >= INPUTS:  # of a factor and a floor for each tile
        factors, floors = factors[:, :: format.block // INPUTS].unbind(2)
    factors = factors.flatten(1)
    if has_zero_points(format):
        floors = factors
    elif has_short_floors(format):
        floors = take(factor_bytes(format)).view(format.factor_dtype).flatten(1)
    elif not format.has_floors:
        floors = None
    repeated = max(format.group // GROUP, 1)
    if format.has_scales:
        scales = (take(GROUPS) ^ 128).view(torch.int8).flatten(1)
    if format.has_minimums:
        minimums = take(GROUPS).flatten(1)[:, ::repeated]
    words = take(INPUTS // 2).unflatten(2, (GROUP, 2))  # [n, T, 32, low and high]
    codes = torch.stack((words & 15, words >> 4), -1).flatten(3).transpose(2, 3).flatten(1)
    return Codes(format, len(index), inputs, codes, factors, scales, floors, minimums)
