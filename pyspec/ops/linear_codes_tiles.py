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
bits where codes have 4 or fewer. q8_0, which is int8 there (kernels/triton/linear.py), has tiles of 64 outputs: factors
[outputs, groups], fp16, then integers [groups, outputs, 32], int8.
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
    "in_tiles",
    "int8_tiles",
    "lay_out_tiles",
    "read_tiles",
    "tile_bytes",
    "tile_inputs",
    "tiles_shape",
    "write_tiles",
]

OUTPUTS, GROUPS = 128, 4  # of a tile
INT8_OUTPUTS = 64  # of a tile of q8_0, which has as many groups
LARGEST_MINIMUM = 127  # that the kernel can read


def in_tiles(device: torch.device) -> bool:
    """Whether weights lie there as a GPU's kernels read them; else as a CPU's do, in panels."""
    return device.type != "cpu"


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


def tile_outputs(format: WeightFormat) -> int:
    return INT8_OUTPUTS if format.bits == 8 else OUTPUTS


def tile_bytes(format: WeightFormat) -> int:
    return tile_outputs(format) * sum(_part_bytes(format))


def tiles_shape(format: WeightFormat, outputs: int, inputs: int) -> tuple[int, int, int]:
    """Panels of outputs, tiles of inputs and bytes of a tile of a weight."""
    inputs += -inputs % format.block
    return -(-outputs // tile_outputs(format)), -(-inputs // tile_inputs(format)), tile_bytes(format)


def _part_bytes(format: WeightFormat) -> list[int]:
    """Of the parts of a tile, in which one output follows the other, the bytes of an output."""
    width = group_inputs(format)
    if format.bits == 8:
        return [2 * GROUPS] + GROUPS * [width]
    factors = [factor_bytes(format)] * (2 if has_short_floors(format) else 1)
    return [*factors, *[GROUPS] * (format.has_scales + format.has_minimums), 2 * width, *[width] * (format.bits > 4)]


def lay_out_tiles(codes: Codes) -> Tensor:
    """A weight as the GPU's kernel reads it: uint8 [panels of outputs, tiles of inputs, tile_bytes].

    Raises:
        ValueError: a minimum is above 127, or (int4) floors are not the factors.
    """
    format = codes.format
    if format.bits == 8:
        return int8_tiles(codes.factors, codes.codes.unflatten(1, (-1, format.block)) ^ 128)
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


def int8_tiles(scales: Tensor, integers: Tensor) -> Tensor:
    """Tiles of q8_0: of scales [N, G] fp16 and integers [N, G, 32], as bytes."""
    fill = (0, -scales.shape[1] % GROUPS, 0, -scales.shape[0] % INT8_OUTPUTS)
    scales = F.pad(scales, fill).unflatten(1, (-1, GROUPS)).unflatten(0, (-1, INT8_OUTPUTS))
    integers = F.pad(integers, (0, 0, *fill))
    integers = integers.unflatten(1, (-1, GROUPS)).unflatten(0, (-1, INT8_OUTPUTS)).permute(0, 2, 3, 1, 4)
    scale_bytes = scales.transpose(1, 2).contiguous().view(torch.uint8)  # [P, T, 64, 4 * 2]
    return torch.cat((scale_bytes.flatten(2), integers.flatten(2)), 2)


def write_tiles(data: Tensor, first: int, codes: Codes) -> None:
    """Lays out codes as the outputs from `first` on of a weight of their format, data."""
    count, high = codes.outputs, tile_outputs(codes.format)
    tiles = lay_out_tiles(codes)
    if first % high == 0 and count % high == 0:
        data[first // high : (first + count) // high] = tiles
        return
    source, at = torch.arange(count, device=data.device), 0
    target = first + source
    for width in _part_bytes(codes.format):
        here, there = (
            part[..., at : at + high * width].unflatten(2, (high, width)) for part in (tiles, data)
        )  # [panels, tiles, outputs, width]
        there[target // high, :, target % high] = here[source // high, :, source % high]
        at += high * width


def _tiles(part: Tensor, wide: int) -> Tensor:
    """[outputs, any] filled up with zeros and cut to [panels, tiles, OUTPUTS, wide], contiguous."""
    part = F.pad(part, (0, -part.shape[1] % wide, 0, -part.shape[0] % OUTPUTS))
    return part.unflatten(1, (-1, wide)).unflatten(0, (-1, OUTPUTS)).transpose(1, 2).contiguous()


def read_tiles(data: Tensor, format: WeightFormat, inputs: int, index: Tensor) -> Codes:
    """The outputs of `index` [n] of a laid out weight, taken apart again."""
    high = tile_outputs(format)
    panel, output = index // high, index % high
    at = 0

    def take(bytes_: int) -> Tensor:
        nonlocal at
        part = data[..., at : at + high * bytes_].unflatten(2, (high, bytes_))
        at += high * bytes_
        return part[panel, :, output]  # [n, T, bytes]

    if format.bits == 8:
        factors = take(2 * GROUPS).view(torch.float16).flatten(1)
        integers = torch.stack([take(format.block) for _ in range(GROUPS)], 2).flatten(1)
        return Codes(format, len(index), inputs, integers ^ 128, factors)
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
