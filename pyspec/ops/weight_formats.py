"""Formats of weights in few bits: how integers become values, and weights taken apart into these integers.

Of input k, in group g of block b, a code of `bits` bits says

    value = factor[b] * scale[g] * levels[code] - floor[b] * minimum[g]

where each format leaves out what it does not have: scales and minimums are then 1, floors 0. All products but the last
difference are exact in fp32, so a weight has one value, whoever computes it. Formats that llama.cpp defined have its
names; int4_32, int4_64 and int4_128 have a scale and a zero point for so many inputs, as GPTQ, AWQ and
compressed-tensors do: factor (code - minimum).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "FORMATS",
    "GGUF_BYTES",
    "GGUF_KINDS",
    "Codes",
    "WeightFormat",
    "from_gguf",
    "from_microscaling",
    "join_codes",
    "quantise",
    "restore_columns",
]

_IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_FP4_LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # e2m1, doubled


@dataclass(frozen=True)
class WeightFormat:
    """How codes become values: factor[b] * scale[g] * levels[code] - floor[b] * minimum[g].

    Attributes:
        name: of the format in `FORMATS`.
        bits: of a code.
        group: inputs that share a scale and a minimum; the whole block where it has one of each.
        block: inputs that share a factor and a floor, a multiple of group.
        levels: 2**bits integers that fit int8.
        has_scales: whether groups have scales, int8; else they are 1.
        has_floors: whether values have a floor; its minimums are 1 where the format has none.
        has_minimums: whether groups have minimums, uint8, to be multiplied by the floor.
        factor_dtype: of factors and floors: float16, or bfloat16 for the powers of two of mxfp4.
    """

    name: str
    bits: int
    group: int
    block: int
    levels: tuple[int, ...]
    has_scales: bool = False
    has_floors: bool = False
    has_minimums: bool = False
    factor_dtype: torch.dtype = torch.float16


def _from(lowest: int, bits: int) -> tuple[int, ...]:
    return tuple(range(lowest, lowest + 2**bits))


_K4 = dict(has_scales=True, has_floors=True, has_minimums=True)
FORMATS = {
    format.name: format
    for format in (
        WeightFormat("q4_0", 4, 32, 32, _from(-8, 4)),
        WeightFormat("q4_1", 4, 32, 32, _from(0, 4), has_floors=True),
        WeightFormat("q5_0", 5, 32, 32, _from(-16, 5)),
        WeightFormat("q5_1", 5, 32, 32, _from(0, 5), has_floors=True),
        WeightFormat("q8_0", 8, 32, 32, _from(-128, 8)),
        WeightFormat("q2_k", 2, 16, 256, _from(0, 2), **_K4),
        WeightFormat("q3_k", 3, 16, 256, _from(-4, 3), has_scales=True),
        WeightFormat("q4_k", 4, 32, 256, _from(0, 4), **_K4),
        WeightFormat("q5_k", 5, 32, 256, _from(0, 5), **_K4),
        WeightFormat("q6_k", 6, 16, 256, _from(-32, 6), has_scales=True),
        WeightFormat("iq4_nl", 4, 32, 32, _IQ4_LEVELS),
        WeightFormat("iq4_xs", 4, 32, 256, _IQ4_LEVELS, has_scales=True),
        WeightFormat("mxfp4", 4, 32, 32, _FP4_LEVELS, factor_dtype=torch.bfloat16),
        *(
            WeightFormat(f"int4_{block}", 4, block, block, _from(0, 4), has_floors=True, has_minimums=True)
            for block in (32, 64, 128)
        ),
    )
}


@dataclass(frozen=True)
class Codes:
    """A weight [outputs, inputs] taken apart; `values()` is the weight, exactly.

    Attributes:
        format: how codes become values.
        outputs: rows of the weight.
        inputs: its columns; codes, groups and blocks are filled up to whole blocks.
        codes: uint8 [outputs, blocks * format.block].
        factors: format.factor_dtype [outputs, blocks].
        scales: int8 [outputs, groups], or None where the format has none.
        floors: format.factor_dtype [outputs, blocks], or None.
        minimums: uint8 [outputs, groups], or None.
        order: int32 [inputs], which column of the weight each column of codes is; None where that is the same.
    """

    format: WeightFormat
    outputs: int
    inputs: int
    codes: Tensor
    factors: Tensor
    scales: Tensor | None = None
    floors: Tensor | None = None
    minimums: Tensor | None = None
    order: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.outputs, self.inputs

    def values(self) -> Tensor:
        """The weight as a matrix [outputs, inputs] fp32."""
        groups = self.format.block // self.format.group
        scales = self.factors.float().repeat_interleave(groups, 1)
        if self.scales is not None:
            scales *= self.scales
        first = self.format.levels[0]
        if self.format.levels == _from(first, self.format.bits):
            levels = self.codes.float().add_(first)
        else:
            levels = _table(self.format, self.codes.device)[self.codes.int()]
        values = levels.unflatten(1, (-1, self.format.group)).mul_(scales[..., None])
        if self.floors is not None:
            floors = self.floors.float().repeat_interleave(groups, 1)
            if self.minimums is not None:
                floors *= self.minimums
            values -= floors[..., None]
        return restore_columns(values.flatten(1)[:, : self.inputs], self.order)

    def rows(self, index: Tensor | slice) -> Codes:
        """Some of the outputs: those of index, int64, or of a slice."""
        parts = {name: part[index] for name, part in _tensors(self).items()}
        return Codes(self.format, len(parts["codes"]), self.inputs, **parts, order=self.order)

    def to(self, device: torch.device) -> Codes:
        """The same on a device."""
        parts = {name: part.to(device) for name, part in _tensors(self).items()}
        order = None if self.order is None else self.order.to(device)
        return Codes(self.format, self.outputs, self.inputs, **parts, order=order)


@cache
def _table(format: WeightFormat, device: torch.device) -> Tensor:
    """The levels, made once: a graph cannot capture a copy from the host."""
    return torch.tensor(format.levels, dtype=torch.float32, device=device)


def restore_columns(values: Tensor, order: Tensor | None) -> Tensor:
    """A matrix whose columns are in an order, see Codes, as it was."""
    return values if order is None else values[:, order.argsort()]


def join_codes(parts: Sequence[Codes]) -> Codes:
    """Weights of one format, so many inputs and one order of them, one below another."""
    tensors = [_tensors(part) for part in parts]
    joined = {name: torch.cat([part[name] for part in tensors]) for name in tensors[0]}
    return Codes(parts[0].format, len(joined["codes"]), parts[0].inputs, **joined, order=parts[0].order)


def _tensors(codes: Codes) -> dict[str, Tensor]:
    parts = {name: getattr(codes, name) for name in ("codes", "factors", "scales", "floors", "minimums")}
    return {name: part for name, part in parts.items() if part is not None}


# ==== GGUF ====
#
# A function takes blocks apart, uint8 [N, B, bytes of a block]: codes [N, B, block], factors [N, B], and scales, floors
# and minimums, [N, B, groups] and [N, B], by name.


def from_gguf(kind: str, data: Tensor, shape: tuple[int, int]) -> Codes:
    """A weight of a GGUF file, taken apart.

    Args:
        kind: ggml's name of the tensor's type, in lower case: q4_0, q4_1, q5_0, q5_1, q8_0, q2_k to q6_k, iq4_nl,
            iq4_xs or mxfp4.
        data: uint8, the tensor's bytes as they lie in the file.
        shape: (outputs, inputs) of the weight.

    Raises:
        ValueError: the type is another one, or data does not have the bytes that shape takes.
    """
    if kind not in _GGUF:
        raise ValueError(f"kind must be one of {', '.join(_GGUF)}, got {kind!r}")
    format = FORMATS[kind]
    block_bytes, take_apart = _GGUF[kind]
    outputs, inputs = shape
    expected = outputs * inputs // format.block * block_bytes
    if inputs % format.block or data.dtype != torch.uint8 or data.numel() != expected:
        raise ValueError(
            f"data must be the {expected} bytes of {outputs} rows of whole blocks of {format.block} inputs for {kind} "
            f"of shape {tuple(shape)}, got {data.dtype} {data.numel()}"
        )
    codes, factors, parts = take_apart(data.reshape(outputs, inputs // format.block, block_bytes))
    parts = {name: part.flatten(1) for name, part in parts.items()}
    return Codes(format, outputs, inputs, codes.flatten(1), factors.flatten(1), **parts)


def _half(data: Tensor) -> Tensor:
    return data.contiguous().view(torch.float16).squeeze(-1)


def _fields(data: Tensor, run: int, bits: int) -> Tensor:
    """Fields of bytes: of every `run` bytes first the lowest `bits` of all, then the next, and so on, [..., more]."""
    data, mask = data.unflatten(-1, (-1, 1, run)), 2**bits - 1
    if run % 8 == 0:  # eight bytes at a time, of a copy, which is aligned
        data = data.clone(memory_format=torch.contiguous_format).view(torch.int64)
        mask *= 0x0101010101010101
    shifts = torch.arange(0, 8, bits, dtype=data.dtype, device=data.device)[:, None]
    return ((data >> shifts) & mask).view(torch.uint8).flatten(-3)


def _bits(data: Tensor) -> Tensor:
    """Bits [..., 8 n] of bytes [..., n], the lowest of each byte first."""
    return _fields(data, 1, 1)


def _q4_0(data: Tensor):
    return _fields(data[..., 2:], 16, 4), _half(data[..., :2]), {}


def _q4_1(data: Tensor):
    return _fields(data[..., 4:], 16, 4), _half(data[..., :2]), {"floors": -_half(data[..., 2:4])}


def _q5_0(data: Tensor):
    return _fields(data[..., 6:], 16, 4) | _bits(data[..., 2:6]) << 4, _half(data[..., :2]), {}


def _q5_1(data: Tensor):
    codes = _fields(data[..., 8:], 16, 4) | _bits(data[..., 4:8]) << 4
    return codes, _half(data[..., :2]), {"floors": -_half(data[..., 2:4])}


def _q8_0(data: Tensor):
    return data[..., 2:] ^ 128, _half(data[..., :2]), {}


def _q2_k(data: Tensor):
    parts = {"scales": (data[..., :16] & 15).to(torch.int8), "minimums": data[..., :16] >> 4}
    return _fields(data[..., 16:80], 32, 2), _half(data[..., 80:82]), {**parts, "floors": _half(data[..., 82:])}


def _q3_k(data: Tensor):
    codes = _fields(data[..., 32:96], 32, 2) | _fields(data[..., :32], 32, 1) << 2
    scales = _fields(data[..., 96:104], 8, 4) | _fields(data[..., 104:108], 4, 2) << 4
    return codes, _half(data[..., 108:]), {"scales": scales.to(torch.int8) - 32}


def _six_bits(data: Tensor) -> dict[str, Tensor]:
    """Eight scales and eight minimums of 6 bits, out of 12 bytes."""
    low, high, rest = data[..., :4], data[..., 4:8], data[..., 8:]
    scales = torch.cat((low & 63, rest & 15 | low >> 2 & 48), -1)
    return {"scales": scales.to(torch.int8), "minimums": torch.cat((high & 63, rest >> 4 | high >> 2 & 48), -1)}


def _q4_k(data: Tensor):
    parts = {**_six_bits(data[..., 4:16]), "floors": _half(data[..., 2:4])}
    return _fields(data[..., 16:], 32, 4), _half(data[..., :2]), parts


def _q5_k(data: Tensor):
    parts = {**_six_bits(data[..., 4:16]), "floors": _half(data[..., 2:4])}
    return _fields(data[..., 48:], 32, 4) | _fields(data[..., 16:48], 32, 1) << 4, _half(data[..., :2]), parts


def _q6_k(data: Tensor):
    codes = _fields(data[..., :128], 64, 4) | _fields(data[..., 128:192], 32, 2) << 4
    return codes, _half(data[..., 208:]), {"scales": data[..., 192:208].contiguous().view(torch.int8)}


def _iq4_xs(data: Tensor):
    scales = _fields(data[..., 4:8], 1, 4) | _fields(data[..., 2:4], 1, 2) << 4
    return _fields(data[..., 8:], 16, 4), _half(data[..., :2]), {"scales": scales.to(torch.int8) - 32}


def _half_powers(exponents: Tensor) -> Tensor:
    """2 ** (exponent - 128) of MXFP4's bytes, bf16: half the scale, as levels are doubled."""
    exponents = exponents.to(torch.int16)  # of which the first two give subnormal numbers
    return torch.where(exponents < 2, 32 << exponents, (exponents - 1) << 7).view(torch.bfloat16)


def _mxfp4(data: Tensor):
    return _fields(data[..., 1:], 16, 4), _half_powers(data[..., 0]), {}


_GGUF: dict[str, tuple[int, Callable]] = {  # bytes of a block, and what takes it apart
    "q4_0": (18, _q4_0),
    "q4_1": (20, _q4_1),
    "q5_0": (22, _q5_0),
    "q5_1": (24, _q5_1),
    "q8_0": (34, _q8_0),
    "q2_k": (84, _q2_k),
    "q3_k": (110, _q3_k),
    "q4_k": (144, _q4_k),
    "q5_k": (176, _q5_k),
    "q6_k": (210, _q6_k),
    "iq4_nl": (18, _q4_0),
    "iq4_xs": (136, _iq4_xs),
    "mxfp4": (17, _mxfp4),
}
GGUF_KINDS = tuple(_GGUF)
GGUF_BYTES = {kind: bytes_ for kind, (bytes_, _) in _GGUF.items()}  # of a block


def from_microscaling(codes: Tensor, exponents: Tensor) -> Codes:
    """A weight [N, K] in MXFP4 as Hugging Face folders have it, taken apart.

    Args:
        codes: uint8 [N, K / 2], the even input of two in the low bits.
        exponents: uint8 [N, K / 32].
    """
    outputs, half = codes.shape
    return Codes(FORMATS["mxfp4"], outputs, 2 * half, _fields(codes, 1, 4), _half_powers(exponents))


# ==== rounding ====


def quantise(weight: Tensor, format: WeightFormat) -> Codes:
    """A weight rounded to one of the int4 formats.

    A block's codes span its smallest to its largest value and 0; the scale is then the one of least squares for these
    codes, and codes are rounded once more with it.

    Args:
        weight: [outputs, inputs] fp32, fp16 or bf16.
        format: int4_32, int4_64 or int4_128 of `FORMATS`.

    Raises:
        ValueError: the format is another one, or a value is not finite or too large for a scale in fp16.
    """
    if not format.name.startswith("int4_"):
        raise ValueError(f"format must be int4_32, int4_64 or int4_128, got {format.name}")
    outputs, inputs = weight.shape
    blocks = F.pad(weight.float(), (0, -inputs % format.block)).unflatten(1, (-1, format.block))
    low, high = blocks.amin(-1, keepdim=True).clamp_(max=0), blocks.amax(-1, keepdim=True).clamp_(min=0)
    scale = (high - low) / 15
    zero = torch.where(scale > 0, -low / scale, 0).round_()

    def codes_of(scale: Tensor) -> Tensor:
        return torch.where(scale > 0, blocks / scale, 0).round_().add_(zero).clamp_(0, 15)

    levels = codes_of(scale) - zero
    square = levels.square().sum(-1, keepdim=True)  # exact, and the other sum nearly so: in any order
    product = (levels.double() * blocks).sum(-1, keepdim=True)
    scale = torch.where(square > 0, product / square, 0).half()
    if not scale.isfinite().all() or not (high - low).isfinite().all():
        largest = weight.abs().max().item()
        raise ValueError(f"weight must be finite and at most {65504 * 7.5:.3g} for {format.name}, got {largest:.3g}")
    codes = codes_of(scale.float()).to(torch.uint8).flatten(1)
    factors, zero = scale.squeeze(-1), zero.to(torch.uint8).squeeze(-1)
    return Codes(format, outputs, inputs, codes, factors, floors=factors, minimums=zero)
