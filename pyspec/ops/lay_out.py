"""lay_out: rows of a matrix, as a file has them, written to their place in a laid out weight.

    outputs first to first + n of the weight = rows order[0] to order[n - 1] of the source

The file may be mapped, and the weight is filled part by part, so nothing is in memory twice. The weight keeps the bits
of the file where it has its format; else its rows become fp32, exactly, and are rounded to bf16 or fp16, or to 8 or 4
bits as `lay_out_weight` does. Where the weight is on a GPU, rows go there as they are in the file, some at a time,
and torch does the rest there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pyspec.ops import linear_codes_tiles as tiles
from pyspec.ops._checks import BadData, check_are_tensors, check_places
from pyspec.ops._library import Op
from pyspec.ops.linear import PANEL, LinearWeight, lay_out_weight
from pyspec.ops.linear_codes import codes_shape, lay_out_codes, take_apart
from pyspec.ops.weight_formats import FORMATS, GGUF_BYTES, Codes, from_gguf, quantise

__all__ = [
    "STORED_KINDS",
    "StoredCodes",
    "StoredMatrix",
    "empty_weight",
    "is_same_order",
    "lay_out",
    "lay_out_reference",
    "laid_out_shape",
    "stored_floats",
]

_FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CPU = torch.device("cpu")
STORED_KINDS = (*GGUF_BYTES, *_FLOATS)  # of a StoredMatrix
_NAMES = [*FORMATS, *_FLOATS]  # the op knows kinds and formats by their place
AT_ONCE = 2**24  # values of a matrix that are taken apart on a GPU, which takes some ten bytes for each


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix [outputs, inputs] in the bytes of a file.

    Attributes:
        kind: ggml's name of its type, in lower case, or float32, float16 or bfloat16: one of STORED_KINDS.
        data: uint8 [bytes], rows one after another; on the CPU, but for what `to` gives.
        outputs: rows of the matrix.
        inputs: its columns.
        order: int64 [outputs], which row of data each is; None where that is the same.
    """

    kind: str
    data: Tensor
    outputs: int
    inputs: int
    order: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.outputs, self.inputs

    def rows(self, index: slice) -> StoredMatrix:
        """Some of its rows, where they are."""
        order = torch.arange(self.outputs, device="cpu") if self.order is None else self.order
        return replace(self, outputs=len(order[index]), order=order[index])

    def to(self, device: torch.device) -> StoredMatrix:
        """The matrix on a device: its own rows alone, in order."""
        rows = self.data.view(-1, row_bytes(self.kind, self.inputs))
        rows = rows[: self.outputs] if self.order is None else rows[self.order]
        return replace(self, data=rows.to(device).flatten(), order=None)

    def columns(self, step: int) -> Tensor:
        """Every step-th column, [outputs, n] fp32: by the kernel, in one go, where `values` would take many ops."""
        _, shape = laid_out_shape("float32", self.outputs, self.inputs)
        data = torch.from_numpy(np.zeros(4 * math.prod(shape), np.uint8))
        weight = empty_weight("float32", self.outputs, self.inputs, data)
        lay_out(weight, 0, self)
        return weight.data[:, ::step].transpose(1, 2).flatten(0, 1)[: self.outputs]

    def ordered(self, order: Tensor) -> StoredMatrix:
        """The matrix of rows order, int64 [outputs], of data."""
        return replace(self, order=order)

    def codes(self) -> Codes | None:
        """The matrix taken apart; None where it has floats."""
        if self.kind in _FLOATS:
            return None
        codes = from_gguf(self.kind, self.data, (len(self.data) // row_bytes(self.kind, self.inputs), self.inputs))
        return codes if self.order is None else codes.rows(self.order)

    def values(self) -> Tensor:
        """The matrix, fp32."""
        if (codes := self.codes()) is not None:
            return codes.values()
        data = self.data if self.data.storage_offset() % 4 == 0 else self.data.clone()
        values = data.view(_FLOATS[self.kind]).float().view(-1, self.inputs)
        return values if self.order is None else values[self.order]


@dataclass(frozen=True)
class StoredCodes:
    """A matrix [outputs, inputs] that is taken apart when it is asked for.

    Attributes:
        kind: the name of its format in FORMATS.
        outputs: rows of the matrix.
        inputs: its columns.
        read: gives the codes.
        read_values: gives the matrix, fp32, where codes only come near to it.
        column_order: the order of the codes, see Codes.
    """

    kind: str
    outputs: int
    inputs: int
    read: Callable[[], Codes]
    read_values: Callable[[], Tensor] | None = None
    column_order: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.outputs, self.inputs

    @cached_property
    def codes(self) -> Codes:
        return self.read()

    def rows(self, index: slice) -> Codes:
        """Some of its rows."""
        return self.codes.rows(index)

    def ordered(self, order: Tensor) -> StoredCodes:
        """The matrix of rows order, int64 [outputs], of this one."""
        read_values = self.read_values and (lambda: self.read_values()[order])
        return replace(self, read=lambda: self.read().rows(order), read_values=read_values)

    def values(self) -> Tensor:
        """The matrix, fp32."""
        return self.codes.values() if self.read_values is None else self.read_values()


def stored_floats(tensor: Tensor) -> StoredMatrix | None:
    """A tensor as it lies in memory; None for what is no matrix of floats on the CPU."""
    kind = str(tensor.dtype).removeprefix("torch.")
    if kind not in _FLOATS or tensor.dim() != 2 or tensor.device.type != "cpu":
        return None
    return StoredMatrix(kind, tensor.contiguous().view(torch.uint8).flatten(), *tensor.shape)


def row_bytes(kind: str, inputs: int) -> int:
    """Bytes of a row of a StoredMatrix."""
    if kind in _FLOATS:
        return inputs * _FLOATS[kind].itemsize
    return inputs // FORMATS[kind].block * GGUF_BYTES[kind]


def laid_out_shape(
    format: str, outputs: int, inputs: int, device: torch.device = CPU
) -> tuple[torch.dtype, tuple[int, ...]]:
    """dtype and shape of the data of a LinearWeight on a device: of a float dtype, int8, or a format of FORMATS."""
    if format not in _FLOATS:
        return torch.uint8, codes_shape(FORMATS["q8_0" if format == "int8" else format], outputs, inputs, device)
    if tiles.in_tiles(device):
        return _FLOATS[format], (outputs, inputs)
    panels = -(-outputs // PANEL)
    if format == "bfloat16":
        return torch.bfloat16, (panels, -(-inputs // 2), PANEL, 2)
    return _FLOATS[format], (panels, inputs, PANEL)


def empty_weight(
    format: str, outputs: int, inputs: int, data: Tensor, column_order: Tensor | None = None
) -> LinearWeight:
    """A LinearWeight of a format, see laid_out_shape, in data, uint8: zeros, as many as it takes.

    column_order is what LinearWeight has as order.
    """
    dtype, shape = laid_out_shape(format, outputs, inputs, data.device)
    kept = None if format in (*_FLOATS, "int8", "q8_0") else FORMATS[format]
    return LinearWeight(data.view(dtype).view(shape), outputs, inputs, kept, column_order)


def lay_out(weight: LinearWeight, first: int, matrix: StoredMatrix | StoredCodes) -> None:
    """Writes a matrix to outputs first to first + matrix.outputs of a weight.

    Args:
        weight: of matrix.inputs inputs: laid out, or from `empty_weight`. Its format is the matrix's own, a float
            dtype, int8 (q8_0) or int4_32; where it has the matrix's own, it has its order of columns too.
        first: the output that the matrix's first row becomes.
        matrix: the rows.

    Raises:
        ValueError: the weight has no room for the rows, or another width, or cannot have this kind of them; or a value
            is NaN, infinite, or too large for the format's scales.
    """
    if weight.inputs != matrix.inputs or not 0 <= first <= weight.outputs - matrix.outputs:
        raise ValueError(
            f"weight must have {matrix.inputs} inputs and room for {matrix.outputs} outputs from {first} on, got "
            f"{weight.outputs} of {weight.inputs}"
        )
    format = "q8_0" if weight.dtype == torch.int8 else str(weight.dtype).removeprefix("torch.")
    panels = weight.data.view(torch.uint8).flatten()
    is_tiled = tiles.in_tiles(weight.data.device)
    if isinstance(matrix, StoredCodes):
        if matrix.kind == format and is_same_order(weight.order, matrix.column_order):
            codes = _checked(matrix.codes)
            return _tile(weight, first, codes, format) if is_tiled else _write_codes(panels, first, codes)
        matrix = stored_floats(matrix.values())
    if weight.order is not None:
        raise ValueError("weight must have its columns in the order of the matrix")
    if is_tiled:
        return _tile(weight, first, matrix, format)
    check_are_tensors(data=matrix.data, order=matrix.order, optional=("order",))
    _OP(panels, first, weight.inputs, _NAMES.index(format), matrix.data, _NAMES.index(matrix.kind), matrix.order)


def _tile(weight: LinearWeight, first: int, matrix: StoredMatrix | Codes, format: str) -> None:
    """lay_out of a matrix on the CPU into a weight on a GPU, whose layout is a GPU's."""
    device, some = weight.data.device, max(AT_ONCE // weight.inputs // tiles.OUTPUTS, 1) * tiles.OUTPUTS
    for start in range(0, matrix.outputs, some):
        part = matrix.rows(slice(start, start + some)).to(device)
        place = first + start
        if format not in _FLOATS:
            tiles.write_tiles(weight.data, place, part if isinstance(part, Codes) else _codes_for(format, part))
            continue
        rows = weight.data[place : place + part.outputs]
        rows.copy_(part.values())
        if not rows.isfinite().all():
            raise BadData("source has values that are NaN or infinite")


def is_same_order(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two weights have their columns in one order, see LinearWeight."""
    return a is b or (a is not None and b is not None and torch.equal(a, b.to(a.device)))


def lay_out_reference(
    panels: Tensor, first: int, inputs: int, format: int, source: Tensor, kind: int, order: Tensor | None
) -> None:
    """Plain PyTorch: the weight out of its panels, some of its outputs replaced, laid out again."""
    name = _NAMES[format]
    rows = len(source) // row_bytes(_NAMES[kind], inputs) if order is None else len(order)
    matrix = StoredMatrix(_NAMES[kind], source, rows, inputs, order)
    dtype, shape = laid_out_shape(name, 1, inputs)
    shape = (-1, *shape[1:])
    if name in _FLOATS:
        dense = panels.view(dtype).view(shape).transpose(1, 2).flatten(2).flatten(0, 1)[:, :inputs].contiguous()
        dense[first : first + rows] = matrix.values()
        if not dense[first : first + rows].isfinite().all():
            raise BadData("source has values that are NaN or infinite")
        panels.copy_(lay_out_weight(dense).data.view(torch.uint8).flatten())
        return
    _write_codes(panels, first, _codes_for(name, matrix))


def _write_codes(panels: Tensor, first: int, codes: Codes) -> None:
    """Writes codes to outputs `first` on of a weight of their format."""
    _, (_, *shape) = laid_out_shape(codes.format.name, 1, codes.inputs)
    panels = panels.view(-1, *shape)
    if first % PANEL or codes.outputs % PANEL:  # other outputs are in a panel with these
        weight = take_apart(panels, codes.format, len(panels) * PANEL, codes.inputs)
        for part in ("codes", "factors", "scales", "floors", "minimums"):
            if (values := getattr(weight, part)) is not None:
                values[first : first + codes.outputs] = getattr(codes, part)
        first, codes = 0, weight
    panels[first // PANEL : first // PANEL + codes.outputs // PANEL] = lay_out_codes(codes)


def _codes_for(name: str, matrix: StoredMatrix) -> Codes:
    """The rows in a format of FORMATS."""
    if matrix.kind == name:
        return _checked(matrix.codes())
    values = matrix.values()
    if not values.isfinite().all():
        raise BadData("source has values that are NaN or infinite")
    try:
        if name == "q8_0":
            return take_apart(lay_out_weight(values, torch.int8).data, FORMATS[name], matrix.outputs, matrix.inputs)
        return quantise(values, FORMATS[name])
    except ValueError:
        raise BadData("source has values that are too large for a scale in fp16") from None


def _checked(codes: Codes) -> Codes:
    if not all(part.isfinite().all() for part in (codes.factors, codes.floors) if part is not None):
        raise BadData("source has values that are NaN or infinite")
    return codes


def _check(panels, first, inputs, format, source, kind, order) -> None:
    if order is not None:
        check_places("order", order, len(source) // row_bytes(_NAMES[kind], inputs), "source has {} rows")


_OP = Op(
    "lay_out",
    "(Tensor(a!) panels, int first, int inputs, int format, Tensor source, int kind, Tensor? order) -> ()",
    lay_out_reference,
    lambda panels, first, inputs, format, source, kind, order: None,
    check=_check,
)
