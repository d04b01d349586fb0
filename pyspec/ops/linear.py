"""linear: x times a weight transposed, for the few rows of a draft tree, at the price of reading the weight.

    out[r, n] = sum over k of x[r, k] weight[n, k] + bias[n]

Every row has the same bits in every call, whatever rows are beside it: each output is summed over the inputs in
one order, for one row or a thousand. There is no number of rows from which another product takes over.

Weights are laid out once (`lay_out_weight`), on the CPU into panels of 32 outputs, so that one row of outputs is one
stream of memory (kernels/params/linear.h). int8 weights have a scale for every 32 inputs; x is then rounded to
8 bits in the same groups, so that products are exact integers:

    out[r, n] = sum over groups g of s_x[r, g] s_w[n, g] sum over k in g of x8[r, k] w8[n, k]

with s_x = max |x| / 127 in the group, which is the arithmetic of llama.cpp's Q8_0. Weights in fewer bits keep the
format that they have, pyspec/ops/weight_formats.py; products with them are in pyspec/ops/linear_codes.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pyspec.ops import linear_codes_tiles as tiles
from pyspec.ops._checks import FLOATS, check_are_tensors, check_floating
from pyspec.ops._library import Op, refuse_gradients
from pyspec.ops.linear_codes import (
    check_index,
    lay_out_codes,
    linear_codes,
    linear_codes_rows,
    linear_joined,
    round_blocks,
    split_panels,
    take_apart,
)
from pyspec.ops.take_columns import take_columns
from pyspec.ops.weight_formats import FORMATS, Codes, WeightFormat, quantise, restore_columns

__all__ = [
    "FORMAT_VERSION",
    "JoinedWeight",
    "LinearWeight",
    "linear",
    "linear_reference",
    "lay_out_weight",
]

FORMAT_VERSION = 1  # of kernels/params/linear.h
PANEL = 32  # outputs
GROUP = 32  # inputs that share a scale
INT8 = FORMATS["q8_0"]
TILE_BYTES = tiles.tile_bytes(INT8)


@dataclass(frozen=True)
class LinearWeight:
    """A weight [outputs, inputs] in the layout that `linear` reads.

    Attributes:
        data: on the CPU panels of 32 outputs, elsewhere rows, or tiles of integers; a float dtype, or uint8 for others.
        outputs: rows of the weight.
        inputs: its columns.
        format: of a weight in fewer than 8 bits, else None.
        order: int32 [inputs], which column of the weight each laid out one is, and so of x; None where that is the
            same.
    """

    data: Tensor
    outputs: int
    inputs: int
    format: WeightFormat | None = None
    order: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype | str:
        """What the weight is kept in: float32, float16, bfloat16, int8 or the name of its format."""
        if self.format is not None:
            return self.format.name
        return torch.int8 if self.data.dtype == torch.uint8 else self.data.dtype

    @property
    def shape(self) -> tuple[int, int]:
        return self.outputs, self.inputs

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    @property
    def rows_by_op(self) -> bool:
        """Whether `rows` of int32 is one op, which a tape records."""
        return self.data.device.type == "cpu" and self.order is None

    def rows(self, index: Tensor) -> Tensor:
        """Some outputs' weights, [n, inputs] fp32, as an embedding reads them; index [n] integers in [0, outputs)."""
        return restore_columns(self._rows(index), self.order)

    def unpack(self) -> Tensor:
        """The weight as a matrix [outputs, inputs] fp32."""
        return restore_columns(self._unpack(), self.order)

    def _rows(self, index: Tensor) -> Tensor:
        if index.dtype != torch.int32 or not self.rows_by_op:
            index = index.long()
        if self.format is not None:
            return linear_codes_rows(index, self.data, self.outputs, self.inputs, self.format)
        if self.data.dim() == 2:
            return self.data[index].float()
        if self.data.shape[-1] == TILE_BYTES:
            return tiles.read_tiles(self.data, INT8, self.inputs, index).values().contiguous()
        return _ROWS(index, self.data, self.outputs, self.inputs)

    def _unpack(self) -> Tensor:
        if self.format is not None:
            return take_apart(self.data, self.format, self.outputs, self.inputs).values()
        return _unpack(self.data, self.outputs, self.inputs)


@dataclass(frozen=True)
class JoinedWeight(LinearWeight):
    """Weights one below another as one weight, each in a format of its own.

    Attributes:
        data: uint8, flat: their panels or tiles one after another.
        parts: format and outputs of each.
    """

    parts: tuple[tuple[WeightFormat, int], ...] = ()
    rows_by_op = False

    @property
    def dtype(self) -> str:
        return ", ".join(format.name for format, _ in self.parts)

    def _rows(self, index: Tensor) -> Tensor:
        return self._unpack()[index]

    def _unpack(self) -> Tensor:
        formats, outputs = zip(*self.parts, strict=True)
        panels = split_panels(self.data, outputs, formats, self.inputs)
        numbers = zip(panels, formats, outputs, strict=True)
        return torch.cat([take_apart(*part, self.inputs).values() for part in numbers])


def lay_out_weight(weight: Tensor | Codes, dtype: torch.dtype | str | None = None) -> LinearWeight:
    """Lays out a weight for `linear`, once, at load.

    Args:
        weight: [outputs, inputs] fp32, fp16 or bf16; or a weight taken apart into codes, which keeps its values.
        dtype: of the laid out values: float32, float16, bfloat16, int8, "int4" (a scale and a zero point for every 32
            inputs), or None for the weight's own.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: weight is not a matrix, is empty, or (int8, int4) a value is too large for a scale in fp16.
        RuntimeError: weight requires a gradient, which int8 and int4 would lose.
    """
    if isinstance(weight, Codes):
        if dtype is None:
            return _lay_out_codes(weight)
        weight = weight.values()
    check_are_tensors(weight=weight)
    dtype = dtype or weight.dtype
    if weight.dtype not in FLOATS or dtype not in (*FLOATS, torch.int8, "int4"):
        raise TypeError(
            f"weight must be float32, float16 or bfloat16, or become int8 or int4, got {weight.dtype} to {dtype}"
        )
    if weight.dim() != 2 or not weight.numel():
        raise ValueError(f"weight must be [outputs, inputs] and not empty, got shape {tuple(weight.shape)}")
    if dtype == "int4":
        refuse_gradients("lay_out_weight", weight=weight)
        return _lay_out_codes(quantise(weight, FORMATS["int4_32"]))
    outputs, inputs = weight.shape
    in_panels = not tiles.in_tiles(weight.device)
    if in_panels and outputs % PANEL:
        weight = F.pad(weight, (0, 0, 0, -outputs % PANEL))
    if dtype == torch.int8:
        refuse_gradients("lay_out_weight", weight=weight)
        data = _lay_out_int8(weight, in_panels)
    elif not in_panels:
        data = weight.to(dtype).contiguous()
    elif dtype == torch.bfloat16:
        even = F.pad(weight.to(dtype), (0, 1)) if inputs % 2 else weight.to(dtype)
        data = even.unflatten(1, (-1, 2)).unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()
    else:
        data = weight.to(dtype).unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()
    return LinearWeight(data, outputs, inputs)


def _lay_out_codes(codes: Codes) -> LinearWeight:
    if codes.format == INT8:
        scales, integers = codes.factors, codes.codes.unflatten(1, (-1, GROUP))
        if in_panels := not tiles.in_tiles(codes.codes.device):
            fill = -len(scales) % PANEL
            scales, integers = F.pad(scales, (0, 0, 0, fill)), F.pad(integers, (0, 0, 0, 0, 0, fill), value=128)
        data = _join_int8(scales, integers, in_panels)
        return LinearWeight(data, codes.outputs, codes.inputs, order=codes.order)
    return LinearWeight(lay_out_codes(codes), codes.outputs, codes.inputs, codes.format, codes.order)


def _lay_out_int8(weight: Tensor, in_panels: bool) -> Tensor:
    weight = F.pad(weight.float(), (0, -weight.shape[1] % GROUP)).unflatten(1, (-1, GROUP))  # [N, G, 32]
    scales = (weight.abs().amax(-1) / 127).half()
    if not scales.isfinite().all():
        raise ValueError(f"weight must be at most {65504 * 127:.3g} for int8, got {weight.abs().max().item():.3g}")
    inverse = torch.where(scales > 0, 1 / scales.float(), 0)
    integers = weight.mul(inverse[..., None]).round_().clamp_(-127, 127)
    return _join_int8(scales, integers.add_(128).to(torch.uint8), in_panels)


def _join_int8(scales: Tensor, integers: Tensor, in_panels: bool) -> Tensor:
    """Panels or tiles of scales [N, G] fp16 and integers + 128, uint8 [N, G, 32]."""
    if not in_panels:
        return tiles.int8_tiles(scales, integers ^ 128)
    integers = integers.unflatten(2, (-1, 4)).unflatten(0, (-1, PANEL)).permute(0, 2, 3, 1, 4)  # [P, G, 8, 32, 4]
    scales = scales.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous().view(torch.uint8)  # [P, G, 64]
    return torch.cat((scales, integers.flatten(2)), 2)


def _split_groups(panels: Tensor) -> tuple[Tensor, Tensor]:
    """Scales [..., G, 32] and integers [..., G, 8, 32, 4], fp32, of int8 panels [..., G, 1088]."""
    scales = panels[..., : 2 * PANEL].contiguous().view(torch.float16).float()
    return scales, panels[..., 2 * PANEL :].unflatten(-1, (-1, PANEL, 4)).float() - 128


def _unpack(data: Tensor, outputs: int, inputs: int) -> Tensor:
    if data.dim() == 2:
        return data.float()
    if data.shape[-1] == TILE_BYTES:
        return tiles.read_tiles(data, INT8, inputs, torch.arange(outputs, device=data.device)).values()
    if data.dtype == torch.uint8:
        scales, integers = _split_groups(data)
        values = (integers * scales[:, :, None, :, None]).permute(0, 3, 1, 2, 4)  # [P, 32, G, 8, 4]
    else:
        values = data.float().transpose(1, 2)  # [P, 32, K] or [P, 32, K / 2, 2]
    return values.flatten(2).flatten(0, 1)[:outputs, :inputs]


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, outputs: int, out_dtype: torch.dtype) -> Tensor:
    """Plain PyTorch, in fp32: x [R, K], a laid out weight's data, bias [N] fp32. The specification of the kernels."""
    values = x.float()
    if weight.dtype == torch.uint8:
        values = round_blocks(values, GROUP)
    out = values @ _unpack(weight, outputs, x.shape[1]).T
    return (out if bias is None else out + bias).to(out_dtype)


def linear_rows_reference(index: Tensor, weight: Tensor, outputs: int, inputs: int) -> Tensor:
    """The rows [n, inputs] fp32 of a weight in panels: those of the outputs in index [n]."""
    panel, lane = index // PANEL, index % PANEL
    if weight.dtype != torch.uint8:
        return weight[panel, :, lane].flatten(1)[:, :inputs].float()
    scales, integers = _split_groups(weight[panel])  # [n, G, 32], [n, G, 8, 32, 4]
    places = torch.arange(len(index), device=index.device)
    values = integers[places, :, :, lane].flatten(2) * scales[places, :, lane, None]
    return values.flatten(1)[:, :inputs]


def _fake(x, weight, bias, outputs, out_dtype) -> Tensor:
    return x.new_empty((x.shape[0], outputs), dtype=out_dtype)


def _triton():
    from pyspec.kernels.linear import linear as launch

    return launch


_OP = Op(
    "linear",
    "(Tensor x, Tensor weight, Tensor? bias, int outputs, ScalarType out_dtype) -> Tensor",
    linear_reference,
    _fake,
    _triton,
)


_ROWS = Op(
    "linear_rows",
    "(Tensor index, Tensor weight, int outputs, int inputs) -> Tensor",
    linear_rows_reference,
    lambda index, weight, outputs, inputs: index.new_empty((len(index), inputs), dtype=torch.float32),
    check=lambda index, weight, outputs, inputs: check_index(index, outputs),
)


def linear(
    x: Tensor, weight: LinearWeight | Tensor, bias: Tensor | None = None, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    """x times weight transposed plus bias; each row has the bits that it has alone.

    Args:
        x: [..., K] fp32, fp16 or bf16 with a contiguous last dimension.
        weight: from `lay_out_weight`; or [N, K], which is laid out in every call. One in fp32 takes x of any dtype.
        bias: [N] floating point.
        out_dtype: of the result: fp32, fp16 or bf16; x's own by default.

    Returns:
        [..., N]. Sums are kept in fp32, one chain of multiply-adds over K for each output.

    Raises:
        TypeError: a dtype is not supported, or a weight of fp16 or bf16 is not of x's dtype.
        ValueError: a shape, stride or device does not fit; the message names the argument.
    """
    check_are_tensors(x=x, bias=bias, optional=("bias",))
    if not isinstance(weight, LinearWeight):
        weight = lay_out_weight(weight)
    out_dtype = out_dtype or x.dtype
    _check(x, weight, bias, out_dtype)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    bias = bias if bias is None or bias.dtype == torch.float32 else bias.float()
    if weight.order is not None:
        rows = take_columns(rows, weight.order)
    if isinstance(weight, JoinedWeight):
        formats, outputs = zip(*weight.parts, strict=True)
        out = linear_joined(rows, weight.data, bias, outputs, formats, out_dtype)
    elif weight.format is None:
        if x.is_cuda and weight.dtype == torch.float32:  # as whose parts its kernel takes x
            rows = rows.float()
        out = _OP(rows, weight.data, bias, weight.outputs, out_dtype)
    else:
        out = linear_codes(rows, weight.data, bias, weight.outputs, weight.format, out_dtype)
    return out if x.dim() == 2 else out.unflatten(0, x.shape[:-1]) if x.dim() > 1 else out[0]


def _check(x: Tensor, weight: LinearWeight, bias: Tensor | None, out_dtype: torch.dtype) -> None:
    check_floating("x", x.dtype)
    check_floating("out_dtype", out_dtype)
    if isinstance(weight.dtype, torch.dtype) and weight.dtype not in (torch.int8, torch.float32, x.dtype):
        raise TypeError(f"weight must be int8, in fewer bits, float32, or {x.dtype} like x, got {weight.dtype}")
    if x.dim() < 1 or x.shape[-1] != weight.inputs:
        raise ValueError(f"x must be [..., {weight.inputs}] for this weight, got shape {tuple(x.shape)}")
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"x must have a contiguous last dimension, got strides {x.stride()}")
    if weight.data.device != x.device:
        raise ValueError(f"weight must be on {x.device} like x, got {weight.data.device}")
    if bias is not None:
        if not bias.is_floating_point() or tuple(bias.shape) != (weight.outputs,):
            raise ValueError(f"bias must be floating point [{weight.outputs}], got {bias.dtype} {tuple(bias.shape)}")
        if bias.device != x.device:
            raise ValueError(f"bias must be on {x.device} like x, got {bias.device}")
