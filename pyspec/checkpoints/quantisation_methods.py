"""Methods of quantisation: how GPTQ, AWQ, compressed-tensors and others keep a matrix in several tensors.

All methods of integers say, of input k, whose group is g,

    value[n, k] = scale[n, g] * (integer[n, k] - zero[n, g])

which the int4 formats and q8_0 (pyspec/ops/weight_formats.py) say too, so that no value changes. Bits, groups and zero
points are read off the tensors, since they may differ from layer to layer. A method is a class in METHODS.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pyspec.architectures import Unsupported
from pyspec.entries import Entries
from pyspec.ops.weight_formats import FORMATS, Codes, WeightFormat, from_microscaling

if TYPE_CHECKING:
    from pyspec.checkpoints.quantised_folders import Module

__all__ = ["METHODS", "Method"]


_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class _Groups:
    """What stands beside the integers of a matrix, see the top of this file.

    Attributes:
        scales: a float dtype, [outputs, groups].
        zeros: uint8, [outputs, groups].
        group: int64 [inputs].
        bits: of an integer.
    """

    scales: Tensor
    zeros: Tensor
    group: Tensor
    bits: int

    def format(self) -> tuple[WeightFormat | None, Tensor | None]:
        """The format that has every value of the matrix, and the order of its columns, see Codes; None without one.

        Columns are put in order, by their groups, only where a block would have inputs of several.
        """
        is_exact = torch.equal(self.scales.half().float(), self.scales.float())
        if not is_exact or self.bits > 4 and not (self.zeros == 128).all():
            return None, None
        names = ("int4_128", "int4_64", "int4_32") if self.bits <= 4 else ("q8_0",)
        for order in (None, self.group.argsort(stable=True).int()):
            for format in (FORMATS[name] for name in names):
                if self._of_blocks(format, order) is not None:
                    return format, order
        return None, None

    def _of_blocks(self, format: WeightFormat, order: Tensor | None) -> Tensor | None:
        """The group of each block of a format; None where a block has inputs of several."""
        group, fill = self.group if order is None else self.group[order], -len(self.group) % format.block
        group = torch.cat((group, group[-1:].expand(fill))).view(-1, format.block)
        return group[:, 0] if torch.equal(group, group[:, :1].expand_as(group)) else None

    def read(self, integers: Tensor) -> Codes | Tensor:
        """The matrix whose integers are these, uint8 [outputs, inputs]: codes, or fp32 where no format has it."""
        format, order = self.format()
        if format is None:
            values = integers.float().sub_(self.zeros.float()[:, self.group])
            return values.mul_(self.scales.float()[:, self.group])
        outputs, inputs = integers.shape
        group = self._of_blocks(format, order)
        integers = integers if order is None else integers[:, order]
        factors, codes = self.scales.half()[:, group], F.pad(integers, (0, -inputs % format.block))
        floors = {"floors": factors, "minimums": self.zeros[:, group]} if format.has_floors else {}
        return Codes(format, outputs, inputs, codes, factors, **floors, order=order)


def _unpack(words: Tensor, bits: int) -> Tensor:
    """The integers of `bits` bits, the lowest bits first, in int32 words [..., n]: uint8 [..., 32 n / bits]."""
    step = bits if 8 % bits == 0 else 1
    shifts = torch.arange(0, 8, step, dtype=torch.uint8, device="cpu")
    fields = (words.contiguous().view(torch.uint8)[..., None] >> shifts & 2**step - 1).flatten(-2)
    if step == bits:
        return fields
    weights = 1 << torch.arange(bits, dtype=torch.uint8, device="cpu")
    return (fields.unflatten(-1, (-1, bits)) * weights).sum(-1, dtype=torch.uint8)


# ==== methods ====


class Method(Protocol):
    """How a method keeps a matrix X.

    Attributes:
        marks: what the name of one of its tensors ends in: one of these.
        matrix: what takes the mark's place in the matrix's own name.
        parts: what the names of all its tensors end in.
    """

    marks: tuple[str, ...]
    matrix: str
    parts: tuple[str, ...]

    def shape(self, module: Module) -> tuple[int, ...]:
        """The matrix's shape; raises ValueError where its parts do not fit each other."""

    def format(self, module: Module) -> tuple[str | None, Tensor | None]:
        """The name of the format that has every value of the matrix, and the order of its columns, see Codes.

        Both are known from its small parts; None without one.
        """

    def read(self, module: Module) -> Codes | Tensor:
        """The matrix, [outputs, inputs]: in its format, or fp32."""


class _OfIntegers:
    """A method of integers: what stands beside them says which format has the matrix."""

    def _groups(self, module: Module) -> _Groups:
        raise NotImplementedError  # abstract: each method has its own

    def _integers(self, module: Module) -> Tensor:
        """uint8 [outputs, inputs]."""
        raise NotImplementedError  # abstract: each method has its own

    def format(self, module: Module) -> tuple[str | None, Tensor | None]:
        format, order = self._groups(module).format()
        return format and format.name, order

    def read(self, module: Module) -> Codes | Tensor:
        return self._groups(module).read(self._integers(module))


class GPTQ(_OfIntegers):
    """Integers of 2, 3, 4 or 8 bits; g_idx has the group of each input, in any order where it was made by desc_act."""

    marks, matrix = (".qweight",), ".weight"
    parts = (".qweight", ".qzeros", ".scales", ".g_idx")

    def __init__(self, source: Path | str, entries: Entries):
        if (bits := entries.whole("bits")) not in (2, 3, 4, 8):
            raise Unsupported(f"{source} has GPTQ's integers of {bits} bits, supported are 2, 3, 4 and 8")
        kind = entries.text("checkpoint_format", "gptq")
        if kind not in ("gptq", "gptq_v2"):
            raise Unsupported(f"{source} has GPTQ's checkpoint_format {kind}, supported are gptq and gptq_v2")
        self._offset = 1 if kind == "gptq" else 0  # the first version kept zero points less one

    def shape(self, module: Module) -> tuple[int, int]:
        rows, outputs = module.shape(".qweight")
        groups, columns = module.shape(".qzeros")
        bits = 32 * columns // outputs  # of this layer, which may have others than most
        if bits not in (2, 3, 4, 8) or 32 * columns % outputs or 32 * rows % bits:
            raise module.wrong(
                ".qzeros", f"have integers of 2, 3, 4 or 8 bits for {outputs} outputs", (groups, columns)
            )
        module.expect(".scales", (groups, outputs))
        return outputs, 32 * rows // bits

    def _groups(self, module: Module) -> _Groups:
        outputs, inputs = self.shape(module)
        zeros = module.tensor(".qzeros", torch.int32)
        bits = 32 * zeros.shape[1] // outputs
        zeros = (_unpack(zeros, bits) + self._offset & 2**bits - 1).T
        group = module.groups(".g_idx", inputs, zeros.shape[1])
        return _Groups(module.tensor(".scales", *_FLOATS).T, zeros, group, bits)

    def _integers(self, module: Module) -> Tensor:
        bits = 32 * module.shape(".qzeros")[1] // module.shape(".qweight")[1]
        return _unpack(module.tensor(".qweight", torch.int32).T, bits)


class AWQ(_OfIntegers):
    """Integers of 4 bits, eight outputs in a word (gemm), or eight inputs (gemv)."""

    marks, matrix = (".qweight",), ".weight"
    parts = (".qweight", ".qzeros", ".scales", ".g_idx")
    _PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # in a word of gemm, of eight outputs

    def __init__(self, source: Path | str, entries: Entries):
        form = entries.text("version", entries.text("checkpoint_format", "gemm")).lower()
        bits = entries.whole("bits", entries.whole("w_bit", 4))
        if form not in ("gemm", "gemv") or bits != 4:
            raise Unsupported(
                f"{source} has AWQ's integers of {bits} bits in the form {form}, supported are 4 bits in gemm and gemv"
            )
        self._by_inputs = form == "gemv"
        self._group = entries.whole("group_size", entries.whole("q_group_size", 128), least=-1)

    def shape(self, module: Module) -> tuple[int, int]:
        (rows, columns), (groups, width) = module.shape(".qweight"), module.shape(".scales")
        if self._by_inputs:  # scales and zero points are filled up to whole words
            module.expect(".scales", (rows, width // 8 * 8))
            module.expect(".qzeros", (rows, width // 8))
            if self._counted(8 * columns) > width:
                raise module.wrong(".scales", f"have groups of {self._group} of {8 * columns} inputs", (groups, width))
            return rows, 8 * columns
        module.expect(".qweight", (rows, width // 8))
        module.expect(".qzeros", (groups, width // 8))
        return width, rows

    def _counted(self, inputs: int) -> int:
        return -(-inputs // self._group) if self._group > 0 else 1

    def _groups(self, module: Module) -> _Groups:
        _, inputs = self.shape(module)
        scales, zeros = module.tensor(".scales", *_FLOATS), self._fours(module, ".qzeros")
        if self._by_inputs:
            groups = self._counted(inputs)
            scales, zeros = scales[:, :groups], zeros[:, :groups]
        else:
            scales = scales.T
        return _Groups(scales, zeros, module.groups(".g_idx", inputs, scales.shape[1]), 4)

    def _integers(self, module: Module) -> Tensor:
        return self._fours(module, ".qweight").contiguous()

    def _fours(self, module: Module, part: str) -> Tensor:
        """[outputs, any], uint8."""
        fours = _unpack(module.tensor(part, torch.int32), 4)
        if self._by_inputs:
            return fours
        places = torch.tensor(self._PLACES, device="cpu")
        return fours.unflatten(1, (-1, 8))[..., places].flatten(1).T


class CompressedTensors(_OfIntegers):
    """Integers of 4 or 8 bits in words, of 8 bits as they are, 8-bit floats, or MXFP4's; with scales of any groups."""

    marks, matrix = (".weight_scale",), ".weight"
    parts = (".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_g_idx")
    _FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mxfp4-pack-quantized")

    def __init__(self, source: Path | str, entries: Entries):
        stated = {entries.text("format", "dense"), entries.part("sparsity_config").text("format", "dense")}
        groups = (group for group in entries.part("config_groups").values() if isinstance(group, dict))
        stated |= {str(group.get("format") or "dense") for group in groups}
        if unknown := sorted(stated - {*self._FORMATS, "mixed-precision", "dense"}):
            raise Unsupported(
                f"{source} has compressed-tensors in the format {unknown[0]}, supported are {', '.join(self._FORMATS)}"
            )
        if entries.part("transform_config").get("config_groups"):
            raise Unsupported(f"{source} has transform_config, which pyspec does not compute")

    def shape(self, module: Module) -> tuple[int, int]:
        if ".weight_packed" not in module:
            return module.shape(".weight")
        outputs, words = module.shape(".weight_packed")
        if ".weight_shape" not in module:  # MXFP4's bytes
            return outputs, 2 * words
        module.expect(".weight_shape", (2,))
        shape = tuple(module.tensor(".weight_shape", torch.int32, torch.int64).tolist())
        if shape[0] != outputs or words not in (-(-shape[1] // 8), -(-shape[1] // 4)):
            raise module.wrong(".weight_packed", f"have integers of 4 or 8 bits for {shape}", (outputs, words))
        return shape

    def format(self, module: Module) -> tuple[str | None, Tensor | None]:
        weight = self._weight(module)
        if weight.dtype in (torch.uint8, *_FP8):
            return "mxfp4" if weight.dtype == torch.uint8 else None, None
        return super().format(module)

    def read(self, module: Module) -> Codes | Tensor:
        weight = self._weight(module)
        if weight.dtype in _FP8:
            return _scaled(module, weight, module.tensor(".weight_scale", *_FLOATS))
        if weight.dtype == torch.uint8:
            module.expect(".weight_scale", (len(weight), weight.shape[1] // 16))
            return from_microscaling(weight, module.tensor(".weight_scale", torch.uint8))
        return super().read(module)

    def _weight(self, module: Module) -> Tensor:
        if ".weight_packed" in module:
            return module.tensor(".weight_packed", torch.int32, torch.uint8)
        return module.tensor(".weight", torch.int8, *_FP8)

    def _bits(self, module: Module) -> int:
        _, inputs = self.shape(module)
        return 4 if ".weight_packed" in module and module.shape(".weight_packed")[1] == -(-inputs // 8) else 8

    def _integers(self, module: Module) -> Tensor:
        weight = self._weight(module)
        if weight.dtype == torch.int8:
            return weight.view(torch.uint8) ^ 128
        return _unpack(weight, self._bits(module))[:, : self.shape(module)[1]]

    def _groups(self, module: Module) -> _Groups:
        (outputs, inputs), bits = self.shape(module), self._bits(module)
        scales = module.tensor(".weight_scale", *_FLOATS)
        if scales.numel() in (1, outputs):  # of the tensor, or of each output
            scales = scales.reshape(-1, 1).expand(outputs, 1)
        elif scales.dim() != 2 or len(scales) != outputs or scales.shape[1] > inputs:
            raise module.wrong(".weight_scale", f"have {outputs} rows of groups", tuple(scales.shape))
        groups, middle = scales.shape[1], 2 ** (bits - 1)
        zeros = torch.full((outputs, groups), middle, dtype=torch.uint8, device="cpu")
        if ".weight_zero_point" in module:
            stated = module.tensor(".weight_zero_point", torch.int32, torch.int8)
            if stated.dtype == torch.int8:
                zeros = (stated.reshape(-1, groups) + middle).to(torch.uint8).expand(outputs, groups)
            else:
                module.expect(".weight_zero_point", (-(-outputs * bits // 32), groups))
                zeros = _unpack(stated.T, bits)[:, :outputs].T
        return _Groups(scales, zeros, module.groups(".weight_g_idx", inputs, groups), bits)


class FP8:
    """8-bit floats, with a scale for every square block of them, or one for all; either name is of what multiplies."""

    marks, matrix = (".weight_scale_inv", ".weight_scale"), ".weight"
    parts = marks

    def __init__(self, source: Path | str, entries: Entries):
        self._block = entries.array("weight_block_size", int, [128, 128])
        if len(self._block) != 2 or min(self._block) < 1:
            raise entries.wrong("weight_block_size", self._block, "two whole numbers above 0")

    def shape(self, module: Module) -> tuple[int, int]:
        return module.shape(".weight")

    def format(self, module: Module) -> tuple[None, None]:
        return None, None

    def read(self, module: Module) -> Tensor:
        part = self.marks[0] if self.marks[0] in module else self.marks[1]
        return _scaled(module, module.tensor(".weight", *_FP8), module.tensor(part, *_FLOATS), part, self._block)


def _scaled(module: Module, weight: Tensor, scale: Tensor, part: str = ".weight_scale", block=(1, 1)) -> Tensor:
    """fp32 of 8-bit floats times scales of blocks, of rows, or of all."""
    outputs, inputs = weight.shape
    if scale.numel() in (1, outputs):
        return weight.float() * scale.float().reshape(-1, 1)
    if scale.shape != (-(-outputs // block[0]), -(-inputs // block[1])):
        raise module.wrong(part, f"have a scale for every {block[0]} x {block[1]}", tuple(scale.shape))
    scale = scale.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return weight.float() * scale[:outputs, :inputs]


class MXFP4:
    """Experts [experts, outputs, inputs / 32, 16 bytes], where two inputs are a byte, and an exponent for each 32."""

    marks, matrix = ("_blocks",), ""
    parts = ("_blocks", "_scales")

    def __init__(self, source: Path | str, entries: Entries):
        pass

    def shape(self, module: Module) -> tuple[int, int, int]:
        *outer, blocks, _ = module.shape("_blocks", 4)
        module.expect("_blocks", (*outer, blocks, 16))
        module.expect("_scales", (*outer, blocks))
        return *outer, 32 * blocks

    def format(self, module: Module) -> tuple[str, None]:
        return "mxfp4", None

    def read(self, module: Module) -> Codes:
        """The outputs of all experts, one expert's below another's."""
        scales = module.tensor("_scales", torch.uint8)
        blocks = module.tensor("_blocks", torch.uint8)
        return from_microscaling(blocks.flatten(2).flatten(0, 1), scales.flatten(0, 1))


def _auto_round(source: Path | str, entries: Entries) -> Method:
    """AutoRound's own settings, of matrices that are laid out as GPTQ's or AWQ's; early files call this a backend."""
    kind = entries.text("packing_format", entries.text("backend", "auto_round:auto_gptq"))
    for name, method in (("gptq", GPTQ), ("awq", AWQ)):
        if name in kind and "gptq_v2" not in kind:
            return method(source, entries)
    raise Unsupported(f"{source} has AutoRound's packing_format {kind}, supported are auto_gptq and auto_awq")


METHODS = {"gptq": GPTQ, "awq": AWQ, "compressed-tensors": CompressedTensors, "fp8": FP8, "mxfp4": MXFP4}
METHODS |= {"auto-round": _auto_round, "intel/auto-round": _auto_round}
