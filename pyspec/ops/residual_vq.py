"""residual_vq: keys and values as sums of codewords, and attention that never rebuilds the keys (residual VQ).

A vector x [D] of one head, a token's key or value, is kept as its scale and the codes of its groups of 32 channels:

    scale = std over the channels (0 becomes 1), fp16
    x / scale ~ C_0[j_0] + C_1[j_1] + ... + C_(depth-1)[j_(depth-1)]     group by group

Each code is the nearest codeword to what the levels before it left, in fp32. Keys are grouped by strides (group g of
G has channels g, g + G, ...: the two channels that rotary embedding mixes stay together), values by neighbours. All
heads and groups of a layer share its codebooks, one set for keys and one for values. As in gear, 128 tokens of one
KV head are a record; kernels/params/residual_vq.h has the layout.

Scores need no keys: with the table T[g][l][j] = q_g . C_l[j], made once for a query, a token's score is
scale * sum of T[g][l][code] over groups and levels. Nor values: with the mass m[g][l][j], the sum of weight * scale
over the tokens whose code is j, the result is sum of m[g][l][j] C_l[j].

Keys are coded as they are cached, turned to their positions by rotary embedding, or as they were before. Then the
table would have to be made for every position: keys are rebuilt, a block at a time, and turned. What turns them is
`rotary` (`rotary_of_blocks`): a key at place t of block b is turned by t and by 128 b.

`residual_vq_attention` is the attention of a draft tree to quantised blocks, then to the exact keys behind them, with
the row rule, as gear_attention is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyspec.ops._checks import check_are_tensors
from pyspec.ops._library import Op
from pyspec.ops.gear import (
    BLOCK,
    HALF,
    TreeRows,
    attention_to_blocks,
    check_seen,
    check_tree,
    join_exact,
    used_blocks,
)
from pyspec.ops.gear_encode import check_floats, check_keys_values
from pyspec.ops.gear_format import check_records
from pyspec.ops.tree_attention import HEAD_DIMS

WIDTH = 32  # channels of a group
CODES = (256, 2048)  # of 8 and 11 bits
MOST_DEPTH = 16
LARGEST = 65504.0  # fp16, which scales are kept in


@dataclass(frozen=True)
class ResidualVqFormat:
    """The format of a record, which the shape of its codebooks decides.

    Args:
        depth: codes of a group, 1 to 16.
        codes: codewords of a level, 256 or 2048.

    Raises:
        ValueError: naming the field that does not fit.
    """

    depth: int = 8
    codes: int = 256

    def __post_init__(self):
        if not 1 <= self.depth <= MOST_DEPTH:
            raise ValueError(f"depth must be in [1, {MOST_DEPTH}], got {self.depth}")
        if self.codes not in CODES:
            raise ValueError(f"codes must be one of {CODES}, got {self.codes}")

    def check_head_dim(self, head_dim: int) -> None:
        """Raises ValueError unless heads of this size can be quantised so."""
        if head_dim not in HEAD_DIMS or head_dim % WIDTH:
            fitting = tuple(d for d in HEAD_DIMS if d % WIDTH == 0)
            raise ValueError(f"head_dim must be one of {fitting}, got {head_dim}")

    @property
    def level_bytes(self) -> int:
        """Bytes of the codes that a block's tokens have in one group and level."""
        return BLOCK * (self.codes.bit_length() - 1) // 8

    def record_bytes(self, head_dim: int) -> int:
        """Bytes of one record: keys and values of 128 tokens of one head."""
        side = 2 * BLOCK + head_dim // WIDTH * self.depth * self.level_bytes
        return -(-2 * side // 64) * 64


def format_of(codebooks: Tensor) -> ResidualVqFormat:
    """The format that codebooks [..., 2, depth, codes, 32] make."""
    return ResidualVqFormat(codebooks.shape[-3], codebooks.shape[-2])


def group_channels(x: Tensor, values: bool) -> Tensor:
    """Reshapes [..., D] to groups of channels [..., D / 32, 32]."""
    return x.unflatten(-1, (-1, WIDTH)) if values else x.unflatten(-1, (WIDTH, -1)).transpose(-1, -2)


def _channels(groups: Tensor, values: bool) -> Tensor:
    """Rows [..., D] of groups [..., D / 32, 32]."""
    return (groups if values else groups.transpose(-1, -2)).flatten(-2)


# ==== keys before rotary embedding ====


def rotary_of_blocks(frequencies: Tensor, blocks: int) -> Tensor:
    """Cosines and sines [128 + blocks, 2, D / 2] fp32 of a token's place in its block, then of each block's first.

    frequencies: [D / 2] radians a position, of channels c and c + D / 2.
    """
    positions = torch.cat([torch.arange(count, device="cpu") * step for count, step in ((BLOCK, 1), (blocks, BLOCK))])
    angles = positions.double()[:, None] * frequencies.cpu().double()
    return torch.stack((angles.cos(), angles.sin()), 1).float().to(frequencies.device)


def turn_keys(k: Tensor, rotary: Tensor, first_block: int = 0, *, back: bool = False) -> Tensor:
    """Keys [..., S, D] turned to their positions, or back, in fp32; the first is that of a block."""
    places, starts = rotary[:BLOCK], rotary[BLOCK + first_block :][: -(-k.shape[-2] // BLOCK), None]
    (cos, sin), (first_cos, first_sin) = places.unbind(1), starts.unbind(2)
    cos, sin = (
        both.flatten(0, 1)[: k.shape[-2]]
        for both in (first_cos * cos - first_sin * sin, first_sin * cos + first_cos * sin)
    )
    sin = -sin if back else sin
    left, right = k.float().chunk(2, -1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)


def check_rotary(rotary: Tensor, blocks: int, head_dim: int, device: torch.device) -> None:
    """Raises TypeError or ValueError unless rotary is that of so many blocks of heads of this size."""
    if rotary.dtype != torch.float32:
        raise TypeError(f"rotary must be float32, got {rotary.dtype}")
    fits = rotary.dim() == 3 and rotary.shape[1:] == (2, head_dim // 2) and len(rotary) >= BLOCK + blocks
    if not fits or not rotary.is_contiguous():
        raise ValueError(
            f"rotary must be contiguous [{BLOCK} + blocks, 2, {head_dim // 2}] for {blocks} blocks and head_dim "
            f"{head_dim}, as rotary_of_blocks makes it, got shape {tuple(rotary.shape)}"
        )
    if rotary.device != device:
        raise ValueError(f"rotary must be on {device} like q, got {rotary.device}")


# ==== encoding ====


def scales_of(x: Tensor) -> Tensor:
    """Scales [...] fp16 of vectors x [..., D] fp32."""
    scale = x.std(-1).clamp_max(LARGEST).half()
    return torch.where(scale == 0, 1.0, scale).half()


def nearest(x: Tensor, codewords: Tensor) -> Tensor:
    """Indices [..., n] of the codewords [..., codes, 32] nearest to each of x [..., n, 32], the first of equals."""
    half_norms = (codewords * codewords).sum(-1) / 2
    return (half_norms[..., None, :] - x @ codewords.transpose(-1, -2)).argmin(-1)


def _pack_codes(codes: Tensor, count: int) -> Tensor:
    """codes [..., 128] int64 to uint8 [..., level_bytes]: the low bytes, then a plane for each of the high bits."""
    parts = [(codes & 255).to(torch.uint8)]
    weights = 1 << torch.arange(8, device=codes.device)
    for bit in range(8, count.bit_length() - 1):
        parts.append(((codes >> bit & 1).unflatten(-1, (-1, 8)) * weights).sum(-1).to(torch.uint8))
    return torch.cat(parts, -1)


def _unpack_codes(quantised: Tensor, count: int) -> Tensor:
    """Codes [..., 128] int64 out of what _pack_codes made."""
    codes = quantised[..., :BLOCK].long()
    shifts = torch.arange(8, device=quantised.device)
    for plane, bit in enumerate(range(8, count.bit_length() - 1)):
        eights = quantised[..., BLOCK + plane * BLOCK // 8 :][..., : BLOCK // 8].long()
        codes = codes | (eights[..., None] >> shifts & 1).flatten(-2) << bit
    return codes


def residual_vq_encode_reference(k: Tensor, v: Tensor, codebooks: Tensor) -> Tensor:
    """Plain PyTorch, in fp32: records [B, Hkv, S / 128, record_bytes] uint8. The specification of the kernels."""
    format, (batch, heads, _, head_dim) = format_of(codebooks), k.shape
    parts = []
    for side, x in enumerate((k, v)):
        x = x.float()
        scale = scales_of(x)
        left = group_channels(x / scale.float()[..., None], side == 1).flatten(1, 3)  # [B, vectors, 32]
        levels = []
        for codewords in codebooks[:, side].float().unbind(1):
            code = nearest(left, codewords)
            left = left - codewords.gather(1, code[..., None].expand(-1, -1, WIDTH))
            levels.append(code)
        codes = torch.stack(levels, -1).view(batch, heads, -1, BLOCK, head_dim // WIDTH, format.depth)
        parts.append(scale.unflatten(-1, (-1, BLOCK)).contiguous().view(torch.uint8))
        parts.append(_pack_codes(codes.movedim(3, -1), format.codes).flatten(3))
    record = torch.cat(parts, -1)
    return torch.nn.functional.pad(record, (0, format.record_bytes(head_dim) - record.shape[-1]))


def residual_vq_decode(quantised: Tensor, codebooks: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Keys and values [B, Hkv, S, D] fp32 of records [B, Hkv, S / 128, record_bytes], as they were coded.

    Args:
        quantised: of residual_vq_encode.
        codebooks: those they were made with, [2, depth, codes, 32] or [B, 2, depth, codes, 32].
        head_dim: D.

    Raises:
        TypeError, ValueError: quantised is not of this format.
    """
    codebooks = _batched(codebooks, quantised.shape[0])
    format = format_of(codebooks)
    check_records(quantised, format, head_dim)
    groups, sides, start = head_dim // WIDTH, [], 0
    for side in range(2):
        scale = (
            quantised[..., start : start + 2 * BLOCK].clone(memory_format=torch.contiguous_format).view(torch.float16)
        )
        start += 2 * BLOCK
        size = groups * format.depth * format.level_bytes
        levels = quantised[..., start : start + size].unflatten(-1, (groups, format.depth, format.level_bytes))
        start += size
        codes = _unpack_codes(levels, format.codes).movedim(-1, 3)  # [B, Hkv, blocks, 128, G, depth]
        x = torch.zeros(*codes.shape[:-1], WIDTH, dtype=torch.float32, device=quantised.device)
        batch = torch.arange(quantised.shape[0], device=quantised.device).view(-1, 1, 1, 1, 1)
        for level in range(format.depth):
            x += codebooks[:, side, level].float()[batch, codes[..., level]]
        sides.append((_channels(x, side == 1) * scale.float()[..., None]).flatten(2, 3))
    return sides[0], sides[1]


# ==== attention to quantised blocks ====


def residual_vq_reference(
    q: Tensor,
    quantised: Tensor,
    seen: Tensor,
    codebooks: Tensor,
    scale: float,
    rotary: Tensor | None = None,
    oldest: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch, in fp32, on rebuilt keys: out like q and lse [B, Hq, T]. The specification of the kernels.

    oldest: [B, T] int32, the first token that each row sees; None for all.
    """
    k, v = residual_vq_decode(used_blocks(quantised, seen), codebooks, q.shape[3])
    return attention_to_blocks(q, k if rotary is None else turn_keys(k, rotary), v, seen, scale, oldest)


def _fake_encode(k, v, codebooks) -> Tensor:
    record = format_of(codebooks).record_bytes(k.shape[3])
    return k.new_empty((*k.shape[:2], k.shape[2] // BLOCK, record), dtype=torch.uint8)


def _fake_attention(q, quantised, seen, codebooks, scale, rotary=None, oldest=None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


_ENCODE = Op(
    "residual_vq_encode",
    "(Tensor k, Tensor v, Tensor codebooks) -> Tensor",
    residual_vq_encode_reference,
    _fake_encode,
)
_ATTENTION = Op(
    "residual_vq",
    "(Tensor q, Tensor quantised, Tensor seen, Tensor codebooks, float scale, Tensor? rotary=None, "
    "Tensor? oldest=None) -> (Tensor, Tensor)",
    residual_vq_reference,
    _fake_attention,
    cuda=True,
    check=check_seen,
)


def check_codebooks(codebooks: Tensor, name: str = "codebooks", dims: int = 4) -> None:
    """Raises TypeError or ValueError unless codebooks are fp16 [..., 2, depth, codes, 32] of `dims` dimensions."""
    if codebooks.dtype != torch.float16:
        raise TypeError(f"{name} must be float16, got {codebooks.dtype}")
    if codebooks.dim() != dims or codebooks.shape[-1] != WIDTH or codebooks.shape[-4] != 2:
        front = {4: "", 5: "layers, "}[dims]
        raise ValueError(f"{name} must be [{front}2, depth, codes, {WIDTH}], got shape {tuple(codebooks.shape)}")
    format_of(codebooks)


def _batched(codebooks: Tensor, batch: int) -> Tensor:
    """Codebooks [B, 2, depth, codes, 32], each item contiguous."""
    check_codebooks(codebooks, dims=min(max(codebooks.dim(), 4), 5))
    if codebooks.dim() == 5 and codebooks.shape[0] != batch:
        raise ValueError(f"codebooks must be one for all, or one for each of {batch}, got {codebooks.shape[0]}")
    codebooks = codebooks.contiguous()
    return codebooks if codebooks.dim() == 5 else codebooks.expand(batch, -1, -1, -1, -1)


def residual_vq_encode(k: Tensor, v: Tensor, codebooks: Tensor) -> Tensor:
    """Encodes keys and values, block by block: a token's codes do not depend on what is encoded beside it.

    Args:
        k, v: [B, Hkv, S, D] fp32, fp16 or bf16 and alike, S a multiple of 128, D in 64, 96, 128, 256.
        codebooks: of keys and of values, [2, depth, codes, 32] fp16, or [B, 2, depth, codes, 32], one for each.

    Returns:
        [B, Hkv, S / 128, record_bytes(D)] uint8.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: a shape, stride or device does not fit, or a value is NaN, infinite or too large for fp16; the
            message names the argument, and where the value is.
    """
    check_are_tensors(k=k, v=v, codebooks=codebooks)
    check_floats("k", k)
    codebooks = _batched(codebooks, k.shape[0])
    format = format_of(codebooks)
    check_keys_values(k, v, format)
    if codebooks.device != k.device:
        raise ValueError(f"codebooks must be on {k.device} like k, got {codebooks.device}")
    return encode_codes(k, v, codebooks)


def encode_codes(k: Tensor, v: Tensor, codebooks: Tensor) -> Tensor:
    """Records of arguments that residual_vq_encode has checked; codebooks [B, 2, depth, codes, 32]."""
    return _ENCODE(k, v, codebooks)


def attend_codes(
    q: Tensor,
    quantised: Tensor,
    rows: TreeRows,
    codebooks: Tensor,
    scale: float,
    rotary: Tensor | None = None,
    records: int = 1,
) -> tuple[Tensor, Tensor]:
    """Attention of q [B, Hq, T, D] to the quantised blocks that rows see: out like q and lse [B, Hq, T]."""
    return _ATTENTION(q, quantised, rows.seen * records, codebooks, scale, rotary, rows.oldest)


def residual_vq_attention(
    q: Tensor,
    quantised: Tensor,
    k: Tensor,
    v: Tensor,
    ancestor_bits: Tensor,
    prefix_lens: Tensor,
    codebooks: Tensor,
    *,
    rotary: Tensor | None = None,
    window: int = HALF,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a draft tree's nodes to quantised blocks, the keys behind them, and their own ancestors.

    Args:
        q: [B, Hq, T, D] fp32, fp16 or bf16, T at most window + 1.
        quantised: [B, Hkv, blocks, record] uint8 of residual_vq_encode, at least the blocks that are seen.
        k, v, ancestor_bits, prefix_lens, window, scale, return_lse: as for gear_attention.
        codebooks: of quantised, [2, depth, codes, 32] fp16.
        rotary: [128 + blocks, 2, D / 2] fp32 of rotary_of_blocks, where quantised has keys as they were before rotary
            embedding; q and k are turned to their positions all the same.

    Returns:
        out like q; with return_lse also lse [B, Hq, T] fp32.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: a shape, stride, device or option does not fit; the message names the argument. On the CPU also when
            prefix_lens point outside of quantised or k.
        RuntimeError: an argument requires a gradient.
    """
    check_are_tensors(q=q, quantised=quantised, k=k, v=v, ancestor_bits=ancestor_bits, prefix_lens=prefix_lens)
    check_are_tensors(codebooks=codebooks, rotary=rotary, optional=("rotary",))
    check_floats("q", q)
    check_codebooks(codebooks)
    if codebooks.device != q.device:
        raise ValueError(f"codebooks must be on {q.device} like q, got {codebooks.device}")
    check_records(quantised, format_of(codebooks), q.shape[3])
    if rotary is not None:
        check_rotary(rotary, quantised.shape[2], q.shape[3], q.device)
    check_tree(q, quantised, k, ancestor_bits, prefix_lens, window, scale)
    rows = TreeRows.of(ancestor_bits, prefix_lens, window)
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    quantised_part = attend_codes(q, quantised, rows, codebooks.contiguous(), scale, rotary)
    out, lse = join_exact(quantised_part, q, k, v, rows, scale)
    return (out, lse) if return_lse else out
