"""A record of quantised keys and values: its settings, its parts, the order of its codes, and reading it back.

BLOCK = 128 tokens of one KV head are quantised together, into one record. Of a matrix X [128, D] of keys or values

    X ~ D + L + S

- S: outliers. Of each vector the outliers / 2 largest and smallest values, kept in bf16. A vector is a channel of the
  keys (128 values) or a token of the values (D values).
- D: the backbone. Within a group of a vector x ~ zero + scale * code, code in 0 .. 2^bits - 1; zero and scale in fp16.
- L: rank `rank` of what D leaves of the others, factors in int8.

Of keys a record may have fewer channels than there are (ThinK), which it then names.

Without S and L that is KIVI (groups) or KCVT (whole vectors), and GEAR-L without S. The layout, bit by bit, is in
kernels/params/gear.h. Where an error of rounding could be in two places it is in the backbone: outliers are exact to
bf16 beside L.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyspec.ops._library import outside_autocast
from pyspec.ops.tree_attention import HEAD_DIMS

FORMAT_VERSION = 1
BLOCK = 128  # tokens of a record
HALF = 64  # tokens whose codes lie together
BITS = (2, 3, 4, 8)
GROUPS = (32, 64, 128)
MOST_RANK = MOST_OUTLIERS = 16


@dataclass(frozen=True)
class GearFormat:
    """How a block of keys and values is quantised.

    Args:
        bits: of a code: 2, 3, 4 or 8.
        group: values that share a scale, 32, 64 or 128: tokens of a channel of the keys, and channels of a token of
            the values, at most all of them.
        rank: of the low-rank part of each block, 0 (none) to 16.
        outliers: of each vector, an even number from 0 (none) to 16.
        fitted: choose ranges, and low rank with them, for the least squared error; else ranges are min-max. That is
            a matter of encoding alone: records are read alike.
        key_channels: how many channels of its keys a record keeps, a multiple of 16, 0 for all. The others count as 0.

    Raises:
        TypeError, ValueError: naming the field that does not fit.
    """

    bits: int = 4
    group: int = 64
    rank: int = 0
    outliers: int = 0
    fitted: bool = False
    key_channels: int = 0

    def __post_init__(self):
        for name in ("bits", "group", "rank", "outliers", "key_channels"):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), int):
                raise TypeError(f"{name} must be an integer, got {getattr(self, name)!r}")
        for name, choices in (("bits", BITS), ("group", GROUPS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)}")
        if not 0 <= self.rank <= MOST_RANK:
            raise ValueError(f"rank must be in [0, {MOST_RANK}], got {self.rank}")
        if not 0 <= self.outliers <= MOST_OUTLIERS or self.outliers % 2:
            raise ValueError(f"outliers must be an even number in [0, {MOST_OUTLIERS}], got {self.outliers}")
        if not isinstance(self.fitted, bool):
            raise TypeError(f"fitted must be True or False, got {self.fitted!r}")
        if self.key_channels < 0 or self.key_channels % 16:
            raise ValueError(f"key_channels must be 0 or a multiple of 16, got {self.key_channels}")

    @property
    def layout(self) -> tuple[int, int, int, int, int]:
        """The settings that a reader of records must know, as the ops take them."""
        return self.bits, self.group, self.rank, self.outliers, self.key_channels

    def check_head_dim(self, head_dim: int) -> None:
        """Raises ValueError unless heads of this size can be quantised so."""
        if head_dim not in HEAD_DIMS:
            raise ValueError(f"head_dim must be one of {HEAD_DIMS}, got {head_dim}")
        if head_dim % self.width(head_dim):
            raise ValueError(f"group must divide the head_dim {head_dim} or be at least as large, got {self.group}")
        if self.key_channels >= head_dim:
            raise ValueError(f"key_channels must be below the head_dim {head_dim}, got {self.key_channels}")

    def record_bytes(self, head_dim: int) -> int:
        """Bytes of one record: keys and values of 128 tokens of one head."""
        sides = [self.parts(head_dim, values) for values in (False, True)]
        return _up(sum(dtype.itemsize * math.prod(shape) for parts in sides for _, dtype, shape in parts), 64)

    def width(self, head_dim: int) -> int:
        """Channels of a token of the values that share a scale."""
        return min(self.group, head_dim)

    def parts(self, head_dim: int, values: bool) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, dtype and shape of what one side of a record holds, in order."""
        channels = head_dim if values or not self.key_channels else self.key_channels
        vectors, length = (BLOCK, channels) if values else (channels, BLOCK)
        groups = length // (self.width(head_dim) if values else self.group)
        half_words = HALF * channels * self.bits // 16
        return [
            ("scale", torch.float16, (groups, vectors)),
            ("zero", torch.float16, (groups, vectors)),
            ("codes", torch.int16, (2, half_words)),
            ("factor", torch.float32, (self.rank,)),
            ("a", torch.int8, (self.rank, BLOCK)),
            ("b", torch.int8, (self.rank, channels)),
            ("outlier_values", torch.bfloat16, (self.outliers, vectors)),
            ("outlier_indices", torch.uint8, (self.outliers, vectors)),
            ("channels", torch.uint8, (0 if values else self.key_channels,)),
        ]


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def low_rank_values(factor: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The low-rank part of each record's numbers, [..., 128, D]."""
    return torch.einsum("...r,...rn,...rd->...nd", factor, a.float(), b.float())


def pack_codes(codes: Tensor, bits: int, values: bool) -> Tensor:
    """codes [..., 128, D] int32 to int16 [..., 2, 4 * D * bits], as kernels/params/gear.h says."""
    front, head_dim = codes.shape[:-2], codes.shape[-1]
    if values:
        vectors = codes.view(*front, 2, 32, 2, head_dim // 16, 16).movedim(-3, -1)  # half, pair, channels, j, i
    else:
        vectors = codes.view(*front, 2, 4, 16, head_dim // 2, 2).movedim(-2, -4)  # half, pair, tokens, j, i
    vectors = vectors.reshape(*front, 2, 2 * head_dim, 32)
    planes, low = [], 0
    for plane in (2, 1) if bits == 3 else (bits,):
        share = 16 // plane
        parts = (vectors >> low & (1 << plane) - 1).unflatten(-2, (-1, share))
        shifts = torch.arange(0, 16, plane, device=codes.device)[:, None]
        words = (parts << shifts).sum(-2)
        planes.append(torch.where(words >= 1 << 15, words - (1 << 16), words).to(torch.int16).flatten(-2))
        low += plane
    return torch.cat(planes, -1)


def _unpack_codes(words: Tensor, bits: int, values: bool, head_dim: int) -> Tensor:
    """Codes [..., 128, D] int32 out of what pack_codes made."""
    front = words.shape[:-2]
    codes, low = 0, 0
    planes = (2, 1) if bits == 3 else (bits,)
    for plane, packed in zip(planes, words.split([4 * head_dim * plane for plane in planes], -1), strict=True):
        shifts = torch.arange(0, 16, plane, device=words.device)[:, None]
        parts = packed.int().unflatten(-1, (-1, 1, 32)) >> shifts & (1 << plane) - 1
        codes = codes | parts.flatten(-3, -2) << low
        low += plane
    if values:
        codes = codes.view(*front, 2, 32, head_dim // 16, 16, 2).movedim(-1, -3)
    else:
        codes = codes.view(*front, 2, head_dim // 2, 4, 16, 2).movedim(-4, -2)
    return codes.reshape(*front, BLOCK, head_dim)


# ==== reading ====


def _decode_side(parts: dict[str, Tensor], f: GearFormat, head_dim: int, values: bool) -> Tensor:
    """One side of the records, decoded: [..., 128, D] fp32."""
    group = f.width(head_dim) if values else f.group
    kept = f.key_channels and not values
    codes = _unpack_codes(parts["codes"], f.bits, values, f.key_channels if kept else head_dim).float()
    vectors = codes if values else codes.transpose(-1, -2)
    indices = parts["outlier_indices"].long().transpose(-1, -2)
    centre = ((1 << f.bits) - 1) / 2
    vectors = vectors.scatter(-1, indices, parts["outlier_values"].float().transpose(-1, -2) + centre)
    scale, zero = (parts[name].float().transpose(-1, -2)[..., None] for name in ("scale", "zero"))
    vectors = (zero + scale * vectors.unflatten(-1, (-1, group))).flatten(-2)
    x = vectors if values else vectors.transpose(-1, -2)
    if f.rank:
        x = x + low_rank_values(parts["factor"], parts["a"], parts["b"])
    if not kept:
        return x
    channels = parts["channels"].long()[..., None, :].expand(x.shape)
    return x.new_zeros(*x.shape[:-1], head_dim).scatter(-1, channels, x)


@outside_autocast
def gear_decode(quantised: Tensor, format: GearFormat, head_dim: int) -> tuple[Tensor, Tensor]:
    """Keys and values [B, Hkv, S, D] fp32 of records [B, Hkv, S / 128, record_bytes], as attention reads them.

    Raises:
        TypeError, ValueError: quantised is not of this format.
    """
    check_records(quantised, format, head_dim)
    sides, start = [], 0
    for values in (False, True):
        parts = {}
        for name, dtype, shape in format.parts(head_dim, values):
            size = dtype.itemsize * math.prod(shape)
            piece = quantised[..., start : start + size].clone(memory_format=torch.contiguous_format)  # aligned
            parts[name] = piece.view(dtype).unflatten(-1, shape) if size else piece.new_empty(*piece.shape[:-1], *shape)
            start += size
        sides.append(_decode_side(parts, format, head_dim, values).flatten(2, 3))
    return sides[0], sides[1]


def check_records(quantised: Tensor, format, head_dim: int) -> None:
    """Raises TypeError or ValueError unless quantised is records of a format, GEAR's or another."""
    format.check_head_dim(head_dim)
    if quantised.dtype != torch.uint8:
        raise TypeError(f"quantised must be uint8, got {quantised.dtype}")
    if quantised.dim() != 4 or quantised.shape[3] != format.record_bytes(head_dim) or quantised.stride(3) != 1:
        raise ValueError(
            f"quantised must be [batch, kv_heads, blocks, {format.record_bytes(head_dim)}] with a contiguous last "
            f"dimension for {format} and head_dim {head_dim}, got shape {tuple(quantised.shape)} and strides "
            f"{quantised.stride()}"
        )
