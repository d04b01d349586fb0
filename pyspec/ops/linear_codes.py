"""linear_codes: x times a weight in few bits transposed; what `linear` calls for such weights.

    out[r, n] = sum over blocks b of s_x[r, b] (factor[n, b] A - floor[n, b] B) + bias[n]
    A = sum over groups g in b of scale[n, g] sum over k in g of x8[r, k] level[n, k]
    B = sum over groups g in b of minimum[n, g] sum over k in g of x8[r, k]

x is rounded to 8 bits in the format's own blocks, s_x = max |x| / 127, so that A and B are exact integers; blocks are
added in order in fp32. The layout, kernels/params/linear_codes.h, keeps every bit of a weight that has been taken apart
(pyspec/ops/weight_formats.py). So does that of a GPU, linear_codes_tiles.py, where x is not rounded.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pyspec.ops import linear_codes_tiles as tiles
from pyspec.ops._checks import BadData
from pyspec.ops._library import Op
from pyspec.ops.weight_formats import FORMATS, Codes, WeightFormat

__all__ = [
    "FORMAT_VERSION",
    "lay_out_codes",
    "linear_codes",
    "linear_codes_reference",
    "linear_codes_rows",
    "linear_joined",
]

FORMAT_VERSION = 1  # of kernels/params/linear_codes.h
PANEL = 32  # outputs
_FORMATS = list(FORMATS.values())  # ops know formats by their place


def lay_out_codes(codes: Codes) -> Tensor:
    """Panels uint8 [ceil(outputs / 32), blocks, bytes of a block] of a weight.

    On a GPU tiles.
    """
    if tiles.in_tiles(codes.codes.device):
        return tiles.lay_out_tiles(codes)
    format = codes.format

    def panels(part: Tensor) -> Tensor:  # [N, n] to [P, B, n / B, 32]
        part = part if len(part) % PANEL == 0 else F.pad(part, (0, 0, 0, -len(part) % PANEL))
        part = part.unflatten(1, (codes.factors.shape[1], -1))
        return part.unflatten(0, (-1, PANEL)).permute(0, 2, 3, 1)

    def pairs(part: Tensor) -> Tensor:  # groups, by two where there are more than one
        part = panels(part)
        return part.unflatten(2, (-1, 2)).transpose(3, 4) if part.shape[2] > 1 else part

    fours = panels(codes.codes.contiguous().view(torch.int32)).contiguous()  # the codes of four inputs are a word

    def plane(bits: int, below: int) -> Tensor:
        """The `bits` bits above the `below` lowest of all codes."""
        mask = (2**bits - 1) * 0x01010101
        parts = [
            (part >> below & mask) << place * bits
            for place, part in enumerate(fours.unflatten(2, (-1, 8 // bits)).unbind(3))
        ]
        return functools.reduce(torch.bitwise_or, parts)

    low = _low_bits(format)
    parts = [panels(codes.factors)]
    if _stores_floors(format):
        parts.append(panels(codes.floors))
    if format.bits == 2:
        parts.append(pairs(codes.scales.view(torch.uint8) | codes.minimums << 4))
    else:
        parts += [pairs(part) for part in (codes.scales, codes.minimums) if part is not None]
    parts.append(plane(low, 0) if low < 8 else fours)
    if format.bits > low:
        parts.append(plane(format.bits - low, low))
    return torch.cat([part.contiguous().flatten(2).view(torch.uint8) for part in parts], 2)


def block_bytes(format: WeightFormat) -> int:
    """Bytes of a block of a panel."""
    groups = format.block // format.group
    bytes_of_group = 1 if format.bits == 2 else format.has_scales + format.has_minimums
    floats = 2 * (1 + _stores_floors(format))
    return PANEL * (floats + groups * bytes_of_group + format.block * format.bits // 8)


def codes_shape(format: WeightFormat, outputs: int, inputs: int, device: torch.device) -> tuple[int, int, int]:
    """Of a laid out weight on a device: its panels, the blocks or tiles of one, and their bytes."""
    if tiles.in_tiles(device):
        return tiles.tiles_shape(format, outputs, inputs)
    return -(-outputs // PANEL), -(-inputs // format.block), block_bytes(format)


def take_apart(data: Tensor, format: WeightFormat, outputs: int, inputs: int) -> Codes:
    """A weight out of its panels or tiles: the Codes that lay_out_codes got."""
    if tiles.in_tiles(data.device):
        return tiles.read_tiles(data, format, inputs, torch.arange(outputs, device=data.device))
    groups, low = format.block // format.group, _low_bits(format)
    at = 0

    def take(count: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        nonlocal at
        part = data[..., at : at + count * PANEL * dtype.itemsize].contiguous().view(dtype)
        at += count * PANEL * dtype.itemsize
        return part.unflatten(2, (count, PANEL))

    def rows(part: Tensor) -> Tensor:  # [P, B, n, 32] to [N, B * n]
        return part.permute(0, 3, 1, 2).flatten(2).flatten(0, 1)[:outputs]

    def pairs(dtype: torch.dtype) -> Tensor:
        part = take(groups, dtype)
        return rows(part.flatten(2).unflatten(2, (-1, PANEL, 2)).transpose(3, 4).flatten(2, 3) if groups > 1 else part)

    def plane(bits: int) -> Tensor:
        fours = take(format.block * bits // 8).flatten(2).unflatten(2, (-1, 1, PANEL, 4)).transpose(4, 5)
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device)[:, None, None]
        return rows((fours >> shifts & 2**bits - 1).flatten(2, 4))

    factors = rows(take(1, format.factor_dtype))
    floors = rows(take(1, format.factor_dtype)) if _stores_floors(format) else factors if format.has_floors else None
    scales = minimums = None
    if format.bits == 2:
        both = pairs(torch.uint8)
        scales, minimums = (both & 15).view(torch.int8), both >> 4
    else:
        scales = pairs(torch.int8) if format.has_scales else None
        minimums = pairs(torch.uint8) if format.has_minimums else None
    codes = plane(low)
    if format.bits > low:
        codes = codes | plane(format.bits - low) << low
    return Codes(format, outputs, inputs, codes, factors, scales, floors, minimums)


def _low_bits(format: WeightFormat) -> int:
    return 2 if format.bits < 4 else 4 if format.bits < 8 else 8


def _stores_floors(format: WeightFormat) -> bool:
    """Whether a block has floors of its own; those of a scale and a zero point are the factors."""
    return format.has_floors and not (format.has_minimums and not format.has_scales)


def check_index(index: Tensor, outputs: int) -> None:
    """Raises BadData where an entry of index [n] is not in [0, outputs)."""
    for place, row in enumerate(index.tolist()):
        if not 0 <= row < outputs:
            raise BadData(f"index must be in [0, {outputs}), got {row} at {place}")


def round_blocks(x: Tensor, block: int) -> Tensor:
    """Rounds x [R, K] fp32 to 8 bits in blocks of inputs."""
    blocks = F.pad(x, (0, -x.shape[1] % block)).unflatten(1, (-1, block))
    largest = blocks.abs().amax(-1, keepdim=True)
    top = largest.new_tensor(127.0)  # as a tensor: 127 / x multiplies by the reciprocal of x, which rounds twice
    factor = top / largest
    factor = torch.where(factor < torch.inf, factor, 0)  # of zeros, and of values too small for a reciprocal
    integers = (blocks * factor).round()
    return (integers * (largest / top)).flatten(1)[:, : x.shape[1]]


def linear_codes_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, outputs: int, format: int, out_dtype: torch.dtype
) -> Tensor:
    """Plain PyTorch, in fp32: x [R, K], a laid out weight, bias [N] fp32. The specification of the kernels."""
    codes, values = take_apart(weight, _FORMATS[format], outputs, x.shape[1]), x.float()
    out = (round_blocks(values, codes.format.block) if x.device.type == "cpu" else values) @ codes.values().T
    return (out if bias is None else out + bias).to(out_dtype)


def split_panels(weight: Tensor, outputs: Sequence[int], formats: Sequence[WeightFormat], inputs: int) -> list[Tensor]:
    """The panels of each of some weights that lie one after another, flat uint8."""
    shapes = [codes_shape(format, count, inputs, weight.device) for count, format in zip(outputs, formats, strict=True)]
    parts = weight.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def linear_joined_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    outputs: Sequence[int],
    formats: Sequence[int],
    out_dtype: torch.dtype,
) -> Tensor:
    """linear_codes_reference of weights one below another, whose panels lie one after another, flat."""
    panels = split_panels(weight, outputs, [_FORMATS[format] for format in formats], x.shape[1])
    biases = [None] * len(panels) if bias is None else bias.split(list(outputs))
    numbers = zip(panels, biases, outputs, formats, strict=True)
    return torch.cat([linear_codes_reference(x, *part, out_dtype) for part in numbers], 1)


def linear_codes_rows_reference(index: Tensor, weight: Tensor, outputs: int, inputs: int, format: int) -> Tensor:
    """The rows [n, inputs] fp32 of a weight in panels: those of the outputs in index [n]."""
    return take_apart(weight, _FORMATS[format], outputs, inputs).values()[index]


def _triton():
    from pyspec.kernels.linear_codes import linear_codes as launch

    return lambda *args: launch(*args[:4], _FORMATS[args[4]], *args[5:])


_OP = Op(
    "linear_codes",
    "(Tensor x, Tensor weight, Tensor? bias, int outputs, int format, ScalarType out_dtype) -> Tensor",
    linear_codes_reference,
    lambda x, weight, bias, outputs, format, out_dtype: x.new_empty((x.shape[0], outputs), dtype=out_dtype),
    _triton,
)
_ROWS = Op(
    "linear_codes_rows",
    "(Tensor index, Tensor weight, int outputs, int inputs, int format) -> Tensor",
    linear_codes_rows_reference,
    lambda index, weight, outputs, inputs, format: index.new_empty((len(index), inputs), dtype=torch.float32),
    check=lambda index, weight, outputs, inputs, format: check_index(index, outputs),
)


def _triton_joined():
    from pyspec.kernels.linear_codes import linear_joined as launch

    def run(x, weight, bias, outputs, formats, out_dtype):
        formats = [_FORMATS[format] for format in formats]
        return launch(x, split_panels(weight, outputs, formats, x.shape[1]), bias, outputs, formats, out_dtype)

    return run


_JOINED = Op(
    "linear_joined",
    "(Tensor x, Tensor weight, Tensor? bias, int[] outputs, int[] formats, ScalarType out_dtype) -> Tensor",
    linear_joined_reference,
    lambda x, weight, bias, outputs, formats, out_dtype: x.new_empty((x.shape[0], sum(outputs)), dtype=out_dtype),
    _triton_joined,
)


def linear_codes(
    x: Tensor, weight: Tensor, bias: Tensor | None, outputs: int, format: WeightFormat, out_dtype: torch.dtype
) -> Tensor:
    """x [R, K] times a laid out weight: [R, N] of out_dtype; arguments are checked by `linear`."""
    return _OP(x, weight, bias, outputs, _FORMATS.index(format), out_dtype)


def linear_codes_rows(index: Tensor, weight: Tensor, outputs: int, inputs: int, format: WeightFormat) -> Tensor:
    """Some outputs' weights, [n, inputs] fp32: of index [n] int32 or int64 in [0, outputs)."""
    if tiles.in_tiles(weight.device):
        return tiles.read_tiles(weight, format, inputs, index).values().contiguous()
    return _ROWS(index, weight, outputs, inputs, _FORMATS.index(format))


def linear_joined(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    outputs: Sequence[int],
    formats: Sequence[WeightFormat],
    out_dtype: torch.dtype,
) -> Tensor:
    """linear_codes of weights one below another, each in its format, whose panels lie one after another, flat."""
    return _JOINED(x, weight, bias, list(outputs), [_FORMATS.index(format) for format in formats], out_dtype)
