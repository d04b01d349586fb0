"""gear: keys and values packed to 2, 3, 4 or 8 bits, and attention that reads them packed (GEAR, KIVI, plain).

BLOCK = 128 tokens of one KV head are packed together, into one record. Of a matrix X [128, D] of keys or values

    X ~ D + L + S        kept in this order, each the best for what the ones before leave

- S: outliers. Of each vector the outliers / 2 largest and smallest values, kept in bf16. A vector is a channel of the
  keys (128 values) or a token of the values (D values).
- D: the backbone. Within a group of a vector x ~ zero + scale * code, code in 0 .. 2^bits - 1; zero is the group's
  smallest value and scale a step, both fp16, over all but the outliers.
- L: rank `rank` of what D leaves of the others, by power iteration, factors in int8.

Without S and L that is KIVI (groups) or KCVT (whole vectors), and GEAR-L without S. The layout of a record is in
kernels/params/gear.h. Where an error of rounding could be in two places it is in the backbone: outliers are exact to
bf16 beside L.

`gear_attention` is the attention of a draft tree to packed blocks, then to the keys and values behind them in full
precision. The rule of what a row sees packed hangs on its position alone (`blocks_seen`), never on the tree or on what
was committed, so the row rule of tree_attention holds here too: a row has the bits of plain decoding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyspec.ops._library import Op
from pyspec.ops.merge_attention import merge_attention
from pyspec.ops.tree_attention import HEAD_DIMS, tree_attention

__all__ = [
    "BLOCK",
    "GearFormat",
    "TreeRows",
    "attend_packed",
    "attend_tree",
    "blocks_seen",
    "check_floats",
    "check_tree",
    "encode_packed",
    "find_unpackable",
    "gear_attention",
    "gear_decode",
    "gear_encode",
    "gear_encode_reference",
    "gear_packed_attention_reference",
    "join_exact",
]

FORMAT_VERSION = 1
BLOCK = 128  # tokens of a record
HALF = 64  # tokens whose codes lie together
BITS = (2, 3, 4, 8)
GROUPS = (32, 64, 128)
MOST_RANK = MOST_OUTLIERS = 16
LARGEST = 65504.0  # fp16, which zeros are kept in
SMALLEST_SCALE = 2.0**-14
PASSES = 3  # of the power iteration
INDEPENDENT = 1e-3  # of its length that a column must have left beside those before it


@dataclass(frozen=True)
class GearFormat:
    """How a block of keys and values is packed.

    Args:
        bits: of a code: 2, 3, 4 or 8.
        group: values that share a scale, 32, 64 or 128: tokens of a channel of the keys, and channels of a token of
            the values, at most all of them.
        rank: of the low-rank part of each block, 0 (none) to 16.
        outliers: of each vector, an even number from 0 (none) to 16.
        rotate: multiply keys, and queries, by a Hadamard matrix, which spreads outliers over the channels.

    Raises:
        TypeError, ValueError: naming the field that does not fit.
    """

    bits: int = 4
    group: int = 64
    rank: int = 0
    outliers: int = 0
    rotate: bool = False

    def __post_init__(self):
        for name in ("bits", "group", "rank", "outliers"):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), int):
                raise TypeError(f"{name} must be an integer, got {getattr(self, name)!r}")
        for name, choices in (("bits", BITS), ("group", GROUPS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)}")
        if not 0 <= self.rank <= MOST_RANK:
            raise ValueError(f"rank must be in [0, {MOST_RANK}], got {self.rank}")
        if not 0 <= self.outliers <= MOST_OUTLIERS or self.outliers % 2:
            raise ValueError(f"outliers must be an even number in [0, {MOST_OUTLIERS}], got {self.outliers}")
        if not isinstance(self.rotate, bool):
            raise TypeError(f"rotate must be True or False, got {self.rotate!r}")

    def check_head_dim(self, head_dim: int) -> None:
        """Raises ValueError unless heads of this size can be packed so."""
        if head_dim not in HEAD_DIMS:
            raise ValueError(f"head_dim must be one of {HEAD_DIMS}, got {head_dim}")
        if head_dim % self._width(head_dim):
            raise ValueError(f"group must divide the head_dim {head_dim} or be at least as large, got {self.group}")
        if self.rotate and head_dim & (head_dim - 1):
            raise ValueError(f"rotate needs a head_dim that is a power of two, got {head_dim}")

    def record_bytes(self, head_dim: int) -> int:
        """Of a block of 128 tokens of one head, keys and values."""
        sides = [self._parts(head_dim, values) for values in (False, True)]
        return _up(sum(dtype.itemsize * math.prod(shape) for parts in sides for _, dtype, shape in parts), 64)

    def _width(self, head_dim: int) -> int:
        return min(self.group, head_dim)

    def _parts(self, head_dim: int, values: bool) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, dtype and shape of what one side of a record holds, in order."""
        vectors, length = (BLOCK, head_dim) if values else (head_dim, BLOCK)
        groups = length // (self._width(head_dim) if values else self.group)
        half_words = HALF * head_dim * self.bits // 16
        return [
            ("scale", torch.float16, (groups, vectors)),
            ("zero", torch.float16, (groups, vectors)),
            ("codes", torch.int16, (2, half_words)),
            ("factor", torch.float32, (self.rank,)),
            ("a", torch.int8, (self.rank, BLOCK)),
            ("b", torch.int8, (self.rank, head_dim)),
            ("outlier_values", torch.bfloat16, (self.outliers, vectors)),
            ("outlier_indices", torch.uint8, (self.outliers, vectors)),
        ]


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def blocks_seen(positions: Tensor | int, window: int) -> Tensor | int:
    """How many packed blocks a row at each position sees; the keys behind them it sees in full precision.

    A block is seen packed by the rows that are at least `window` positions behind its end. So the nodes of a tree of
    at most window + 1 nodes need only blocks that are committed whole.
    """
    blocks = (positions - window) // BLOCK
    return max(blocks, 0) if isinstance(blocks, int) else blocks.clamp_min(0)


# ==== packing ====


def rotated(x: Tensor) -> Tensor:
    """x [..., D] times the Hadamard matrix / sqrt(D), which is its own inverse; fp32."""
    head_dim, shape = x.shape[-1], x.shape
    x = x.float()
    size = 1
    while size < head_dim:
        first, second = x.reshape(*shape[:-1], -1, 2, size).unbind(-2)
        x = torch.stack((first + second, first - second), -2)
        size *= 2
    return x.reshape(shape) * head_dim**-0.5


def _half(x: Tensor, upwards: bool) -> Tensor:
    """x in fp16, rounded to the side."""
    half = x.half()
    wrong = half.float() < x if upwards else half.float() > x
    bits = half.view(torch.int16)
    away = (bits >= 0) == upwards  # the neighbour on that side is the next larger magnitude
    neighbour = bits + torch.where(away, 1, -1).to(torch.int16)
    past_zero = 1 if upwards else -0x7FFF  # the smallest number on the other side of 0
    neighbour = torch.where(bits & 0x7FFF == 0, past_zero, neighbour.int()).to(torch.int16)
    return torch.where(wrong, neighbour, bits).view(torch.float16)


def _orthonormal(x: Tensor) -> Tensor:
    """The columns of x [..., n, r], each made orthogonal to those before and of length 1, or 0 if nothing is left."""
    columns: list[Tensor] = []
    for column in x.unbind(-1):
        length = column.norm(dim=-1, keepdim=True)
        for _ in range(2):  # once leaves what rounding made
            for other in columns:
                column = column - (column * other).sum(-1, keepdim=True) * other
        left = column.norm(dim=-1, keepdim=True)
        columns.append(torch.where(left > INDEPENDENT * length, column / left, 0.0))
    return torch.stack(columns, -1)


def _start(head_dim: int, rank: int, device: torch.device) -> Tensor:
    """[D, rank] in [-0.5, 0.5): any fixed numbers without a pattern do."""
    numbers = torch.arange(1, head_dim * rank + 1, device=device).view(head_dim, rank) * 2654435761
    return (numbers >> 16 & 0xFFFF).float() / 65536 - 0.5


def _to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of x [..., n, r] as int8 [..., r, n] and what to multiply them by [..., r]."""
    x = x.transpose(-1, -2)
    step = x.abs().amax(-1) / 127
    return torch.where(step[..., None] > 0, x / step[..., None], 0.0).round().to(torch.int8), step


def _low_rank(residual: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """factor [..., rank], a [..., rank, 128] and b [..., rank, D] of residual [..., 128, D]; see the module."""
    b = _start(residual.shape[-1], rank, residual.device)
    for _ in range(PASSES):
        a = _orthonormal(residual @ _orthonormal(b))
        b = residual.transpose(-1, -2) @ a
    a, a_step = _to_int8(a)
    b, b_step = _to_int8(b)
    return a_step * b_step, a, b


def _low_rank_values(factor: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """[..., 128, D]."""
    return torch.einsum("...r,...rn,...rd->...nd", factor, a.float(), b.float())


def _pack_codes(codes: Tensor, bits: int, values: bool) -> Tensor:
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
    """The reverse: codes [..., 128, D] int32."""
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


def _encode_side(x: Tensor, f: GearFormat, values: bool) -> list[Tensor]:
    """The parts of one side of the records of x [..., 128, D] fp32."""
    vectors = x if values else x.transpose(-1, -2)  # [..., vectors, length]
    group = f._width(x.shape[-1]) if values else f.group
    levels = (1 << f.bits) - 1

    order = [(sign * vectors).sort(dim=-1, stable=True).indices[..., : f.outliers // 2] for sign in (-1, 1)]
    indices = torch.cat(order, -1)  # [..., vectors, outliers]: largest, then smallest
    is_outlier = torch.zeros_like(vectors, dtype=torch.bool).scatter(-1, indices, True)

    groups = vectors.unflatten(-1, (-1, group))
    in_backbone = ~is_outlier.unflatten(-1, (-1, group))
    lowest = torch.where(in_backbone, groups, torch.inf).amin(-1)
    highest = torch.where(in_backbone, groups, -torch.inf).amax(-1)
    zero = _half(lowest + 0.0, upwards=False)  # [..., vectors, groups]; + 0.0: there is one zero
    scale = _half(((highest - zero.float()) / levels).clamp_min(SMALLEST_SCALE), upwards=True)
    wide_zero, wide_scale = (part.float()[..., None] for part in (zero, scale))
    codes = ((groups - wide_zero) / wide_scale).round().clamp(0, levels)

    left = vectors
    low_rank = [x.new_empty(*x.shape[:-2], 0, *rest) for rest in ((), (BLOCK,), (x.shape[-1],))]
    if f.rank:
        residual = (groups - (wide_zero + wide_scale * codes)).flatten(-2).masked_fill(is_outlier, 0.0)
        low_rank = _low_rank(residual if values else residual.transpose(-1, -2), f.rank)
        fitted = _low_rank_values(*low_rank)
        left = vectors - (fitted if values else fitted.transpose(-1, -2))
    at = indices // group
    outliers = left.gather(-1, indices) - zero.float().gather(-1, at)
    outliers = outliers / scale.float().gather(-1, at) - levels / 2

    codes = codes.flatten(-2).int()
    return [
        scale.transpose(-1, -2),
        zero.transpose(-1, -2),
        _pack_codes(codes if values else codes.transpose(-1, -2).contiguous(), f.bits, values),
        *low_rank,
        outliers.transpose(-1, -2),
        indices.transpose(-1, -2),
    ]


def gear_encode_reference(
    k: Tensor, v: Tensor, bits: int, group: int, rank: int, outliers: int, rotate: bool
) -> Tensor:
    """Plain PyTorch, in fp32: records [B, Hkv, S / 128, record_bytes] uint8. The specification of the kernels."""
    f, head_dim = GearFormat(bits, group, rank, outliers, rotate), k.shape[-1]
    parts = []
    for x, values in ((k, False), (v, True)):
        x = x.float().unflatten(2, (-1, BLOCK))
        encoded = _encode_side(rotated(x) if rotate and not values else x, f, values)
        for part, (_, dtype, _) in zip(encoded, f._parts(head_dim, values), strict=True):
            parts.append(part.to(dtype).contiguous().flatten(3).view(torch.uint8))
    record = torch.cat(parts, -1)
    return torch.nn.functional.pad(record, (0, f.record_bytes(head_dim) - record.shape[-1]))


def _decode_side(parts: dict[str, Tensor], f: GearFormat, head_dim: int, values: bool) -> Tensor:
    """[..., 128, D] fp32."""
    group = f._width(head_dim) if values else f.group
    codes = _unpack_codes(parts["codes"], f.bits, values, head_dim).float()
    vectors = codes if values else codes.transpose(-1, -2)
    indices = parts["outlier_indices"].long().transpose(-1, -2)
    centre = ((1 << f.bits) - 1) / 2
    vectors = vectors.scatter(-1, indices, parts["outlier_values"].float().transpose(-1, -2) + centre)
    scale, zero = (parts[name].float().transpose(-1, -2)[..., None] for name in ("scale", "zero"))
    vectors = (zero + scale * vectors.unflatten(-1, (-1, group))).flatten(-2)
    x = vectors if values else vectors.transpose(-1, -2)
    return x + _low_rank_values(parts["factor"], parts["a"], parts["b"]) if f.rank else x


def gear_decode(packed: Tensor, format: GearFormat, head_dim: int) -> tuple[Tensor, Tensor]:
    """Keys and values [B, Hkv, S, D] fp32 of records [B, Hkv, S / 128, record_bytes], as attention reads them.

    Raises:
        TypeError, ValueError: packed is not of this format.
    """
    _check_packed(packed, format, head_dim)
    sides, start = [], 0
    for values in (False, True):
        parts = {}
        for name, dtype, shape in format._parts(head_dim, values):
            size = dtype.itemsize * math.prod(shape)
            piece = packed[..., start : start + size].clone(memory_format=torch.contiguous_format)  # aligned
            parts[name] = piece.view(dtype).unflatten(-1, shape) if size else piece.new_empty(*piece.shape[:-1], *shape)
            start += size
        side = _decode_side(parts, format, head_dim, values)
        sides.append((rotated(side) if format.rotate and not values else side).flatten(2, 3))
    return sides[0], sides[1]


# ==== attention to packed blocks ====


def gear_packed_attention_reference(
    q: Tensor,
    packed: Tensor,
    seen: Tensor,
    bits: int,
    group: int,
    rank: int,
    outliers: int,
    rotate: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch, in fp32: out like q and lse [B, Hq, T]. The specification of the kernels."""
    used = torch.arange(packed.shape[2], device=q.device) < seen.amax(1, keepdim=True)  # [B, blocks]
    packed = packed.masked_fill(~used[:, None, :, None], 0)  # blocks that no row sees may hold anything
    k, v = gear_decode(packed, GearFormat(bits, group, rank, outliers, rotate), q.shape[3])
    slots, kv_heads = torch.arange(k.shape[2], device=q.device), k.shape[1]
    visible = (slots < seen[..., None] * BLOCK)[:, None, None]  # [B, 1, 1, T, S]
    grouped = q.float().unflatten(1, (kv_heads, q.shape[1] // kv_heads))
    scores = (torch.einsum("bhgtd,bhsd->bhgts", grouped, k) * scale).masked_fill(~visible, -torch.inf)
    weights = torch.where(visible, scores.softmax(-1), 0.0)
    out = torch.einsum("bhgts,bhsd->bhgtd", weights, v).flatten(1, 2)
    return torch.empty_like(q).copy_(out), scores.logsumexp(-1).flatten(1, 2)


def _fake_encode(k, v, bits, group, rank, outliers, rotate) -> Tensor:
    record = GearFormat(bits, group, rank, outliers, rotate).record_bytes(k.shape[3])
    return k.new_empty((*k.shape[:2], k.shape[2] // BLOCK, record), dtype=torch.uint8)


def _fake_attention(q, packed, seen, bits, group, rank, outliers, rotate, scale) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


_ENCODE = Op(
    "gear_encode",
    "(Tensor k, Tensor v, int bits, int group, int rank, int outliers, bool rotate) -> Tensor",
    gear_encode_reference,
    _fake_encode,
)
_ATTENTION = Op(
    "gear_packed_attention",
    "(Tensor q, Tensor packed, Tensor seen, int bits, int group, int rank, int outliers, bool rotate, float scale) "
    "-> (Tensor, Tensor)",
    gear_packed_attention_reference,
    _fake_attention,
)


def _fields(f: GearFormat) -> tuple:
    return f.bits, f.group, f.rank, f.outliers, f.rotate


def _check_packed(packed: Tensor, f: GearFormat, head_dim: int) -> None:
    f.check_head_dim(head_dim)
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed must be uint8, got {packed.dtype}")
    if packed.dim() != 4 or packed.shape[3] != f.record_bytes(head_dim) or packed.stride(3) != 1:
        raise ValueError(
            f"packed must be [batch, kv_heads, blocks, {f.record_bytes(head_dim)}] with a contiguous last dimension "
            f"for {f} and head_dim {head_dim}, got shape {tuple(packed.shape)} and strides {packed.stride()}"
        )


def check_floats(name: str, tensor: Tensor) -> None:
    """Raises TypeError or ValueError unless a tensor is one that ops compute with."""
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"{name} must be float32, float16 or bfloat16, got {tensor.dtype}")
    if tensor.dim() != 4 or tensor.stride(3) != 1:
        raise ValueError(
            f"{name} must have 4 dimensions, the last contiguous, got shape {tuple(tensor.shape)} "
            f"and strides {tensor.stride()}"
        )


def find_unpackable(k: Tensor, v: Tensor, format: GearFormat) -> tuple[str, list[int], float, float] | None:
    """The first value that cannot be packed: "k" or "v", where, what it is, and what it may be at most."""
    for name, tensor in (("k", k), ("v", v)):
        # a rotated channel is at most sqrt(D) times the largest
        limit = LARGEST / math.sqrt(k.shape[3]) if format.rotate and name == "k" else LARGEST
        good = tensor.abs() <= limit  # not for NaN
        if not good.all():
            place = (~good).nonzero()[0].tolist()
            return name, place, tensor[tuple(place)].item(), limit
    return None


def gear_encode(k: Tensor, v: Tensor, format: GearFormat) -> Tensor:
    """Packs keys and values, block by block: a block's record does not depend on what is packed beside it.

    Args:
        k, v: [B, Hkv, S, D] fp32, fp16 or bf16 and alike, S a multiple of 128, D in HEAD_DIMS.
        format: what to keep.

    Returns:
        [B, Hkv, S / 128, format.record_bytes(D)] uint8.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: a shape, stride or device does not fit, or a value is NaN, infinite or too large for fp16; the
            message names the argument, and where the value is.
    """
    check_floats("k", k)
    check_floats("v", v)
    if v.shape != k.shape or v.dtype != k.dtype or v.device != k.device:
        raise ValueError(
            f"v must be like k, {k.dtype} {tuple(k.shape)} on {k.device}, got {v.dtype} {tuple(v.shape)} on {v.device}"
        )
    if k.shape[2] % BLOCK:
        raise ValueError(f"k must have a multiple of {BLOCK} tokens, got {k.shape[2]}")
    format.check_head_dim(k.shape[3])
    if (bad := find_unpackable(k, v, format)) is not None:
        name, (sequence, head, position, channel), value, limit = bad
        raise ValueError(
            f"{name} must hold values of at most {limit:.0f} in magnitude, got {value} at sequence {sequence}, "
            f"head {head}, position {position}, channel {channel}"
        )
    return encode_packed(k, v, format)


def encode_packed(k: Tensor, v: Tensor, format: GearFormat) -> Tensor:
    """gear_encode of what was checked."""
    return _ENCODE(k, v, *_fields(format))


def attend_packed(q: Tensor, packed: Tensor, seen: Tensor, format: GearFormat, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of q [B, Hq, T, D] to the first seen [B, T] int32 blocks of packed: out like q and lse [B, Hq, T]."""
    return _ATTENTION(q, packed, seen, *_fields(format), scale)


# ==== attention of a tree to packed blocks and to the keys behind them ====


@dataclass(frozen=True)
class TreeRows:
    """What the nodes of a batch of trees see, the same in all layers."""

    ancestor_bits: Tensor  # [B, T, ceil(T / 32)] int32
    seen: Tensor  # [B, T] int32, packed blocks; 0 for padding
    first: Tensor  # [B, 1] int32, those of the root
    dense_lens: Tensor  # [B] int32, committed keys behind the root's blocks
    most: int  # blocks that a node sees packed and its root does not

    @classmethod
    def of(cls, ancestor_bits: Tensor, prefix_lens: Tensor, window: int) -> TreeRows:
        nodes = torch.arange(ancestor_bits.shape[1], device=ancestor_bits.device)
        depths = ((ancestor_bits[..., nodes // 32] >> nodes % 32) & 1).sum(-1) - 1
        seen = blocks_seen(prefix_lens[:, None] + depths, window).masked_fill(depths < 0, 0).int()
        first = blocks_seen(prefix_lens, window)
        most = int((seen - first[:, None]).max()) if seen.numel() else 0
        return cls(ancestor_bits, seen, first[:, None], prefix_lens - first * BLOCK, max(most, 0))


def attend_tree(
    q: Tensor, packed: Tensor, k: Tensor, v: Tensor, rows: TreeRows, format: GearFormat, scale: float
) -> tuple[Tensor, Tensor]:
    """gear_attention for rows that were worked out before: out like q and lse [B, Hq, T]."""
    return join_exact(attend_packed(q, packed, rows.seen, format, scale), q, k, v, rows, scale)


def join_exact(
    packed_part: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor, rows: TreeRows, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention to packed blocks, out like q and lse [B, Hq, T], joined with that to the exact keys behind them."""
    dense, dense_lse = tree_attention(q, k, v, rows.ancestor_bits, rows.dense_lens, scale=scale, return_lse=True)
    for more in range(1, rows.most + 1):  # nodes that are far enough from a block to see it packed, unlike the root
        past = more * BLOCK
        lens = (rows.dense_lens - past).clamp_min(0)
        there = tree_attention(
            q, k[:, :, past:], v[:, :, past:], rows.ancestor_bits, lens, scale=scale, return_lse=True
        )
        chosen = (rows.seen - rows.first == more)[:, None]
        dense = torch.where(chosen[..., None], there[0], dense)
        dense_lse = torch.where(chosen, there[1], dense_lse)
    return merge_attention(*packed_part, dense, dense_lse)


def gear_attention(
    q: Tensor,
    packed: Tensor,
    k: Tensor,
    v: Tensor,
    ancestor_bits: Tensor,
    prefix_lens: Tensor,
    format: GearFormat,
    *,
    window: int = HALF,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a draft tree's nodes to packed blocks, the keys behind them, and their own ancestors.

    A row at position p sees the first blocks_seen(p, window) blocks packed and what follows in full precision.

    Args:
        q: [B, Hq, T, D] fp32, fp16 or bf16, T at most window + 1.
        packed: [B, Hkv, blocks, record] uint8 of gear_encode, at least the blocks that are seen.
        k, v: [B, Hkv, S, D] like q. Slot 0 is the first position that the root does not see packed,
            blocks_seen(n, window) * 128 for n committed keys; the tree's keys follow the committed ones.
        ancestor_bits, prefix_lens: as for tree_attention; n counts packed tokens too.
        format: of packed.
        window: how far behind a block's end a row must be to see it packed.
        scale: factor of the scores, positive; 1 / sqrt(D) by default.
        return_lse: also return the natural log-sum-exp of the scores.

    Returns:
        out like q; with return_lse also lse [B, Hq, T] fp32.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: a shape, stride, device or option does not fit; the message names the argument.
        RuntimeError: on the CPU, when prefix_lens point outside packed or k.
    """
    check_floats("q", q)
    head_dim = q.shape[3]
    _check_packed(packed, format, head_dim)
    check_tree(q, packed, k, ancestor_bits, prefix_lens, window)
    rows = TreeRows.of(ancestor_bits, prefix_lens, window)
    out, lse = attend_tree(q, packed, k, v, rows, format, 1 / math.sqrt(head_dim) if scale is None else scale)
    return (out, lse) if return_lse else out


def check_tree(q: Tensor, packed: Tensor, k: Tensor, ancestor_bits: Tensor, prefix_lens: Tensor, window: int) -> None:
    """Raises ValueError unless a tree's queries, its shape and its packed blocks fit together."""
    batch, heads, nodes, _ = q.shape
    if packed.shape[0] != batch or not packed.shape[1] or heads % packed.shape[1]:
        raise ValueError(
            f"packed must have batch {batch} and a number of heads that divides the {heads} of q, "
            f"got shape {tuple(packed.shape)}"
        )
    if packed.device != q.device:
        raise ValueError(f"packed must be on {q.device} like q, got {packed.device}")
    if k.dim() != 4 or k.shape[1] != packed.shape[1]:
        raise ValueError(f"k must have the {packed.shape[1]} heads of packed, got shape {tuple(k.shape)}")
    for name, tensor, shape in (
        ("ancestor_bits", ancestor_bits, (batch, nodes, (nodes + 31) // 32)),
        ("prefix_lens", prefix_lens, (batch,)),
    ):
        if tensor.dtype != torch.int32 or tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be int32 {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if nodes > window + 1:
        raise ValueError(f"q must have at most window + 1 = {window + 1} nodes, got {nodes}")
