"""gear_encode: keys and values to records (pyspec.ops.gear_format).

Outliers go out first, then every group of the rest gets its range, then low rank takes what rounding left, by power
iteration. That is the published recipe, with ranges from the smallest to the largest value. A `fitted` format goes on
from there to less squared error in the same bits:

- ranges are tried at several widths, and each is moved to the least squares of its codes (Lloyd's steps: codes for a
  range, the best range for the codes);
- then, round after round, low rank is fitted to what the backbone leaves and the backbone to what low rank leaves.

Nothing outside of a block has a part in its record.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyspec.ops._checks import check_are_tensors, check_floating
from pyspec.ops._library import Op
from pyspec.ops.gear_format import BLOCK, GearFormat, low_rank_values, pack_codes

LARGEST = 65504.0  # fp16, which zeros are kept in
SMALLEST_SCALE = 2.0**-14
PASSES = 3  # of the power iteration
WIDTHS = (1.0, 0.85, 0.7)  # of min-max that a fitted range is tried at
STEPS = 2  # of Lloyd for each
ROUNDS = 4  # of low rank and backbone, when fitted to each other
INDEPENDENT = 1e-3  # of its length that a column must have left beside those before it


def _half(x: Tensor, upwards: bool) -> Tensor:
    """x rounded to fp16, down or up as asked."""
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
    """A start [D, rank] in [-0.5, 0.5) of the power iteration: any fixed numbers without a pattern do."""
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


def _codes(groups: Tensor, zero: Tensor, scale: Tensor, levels: int) -> Tensor:
    """Codes 0 .. levels, in fp32, of groups [..., group] with a zero and scale [...] in fp16."""
    return ((groups - zero.float()[..., None]) / scale.float()[..., None]).round().clamp(0, levels)


def _backbone(codes: Tensor, zero: Tensor, scale: Tensor) -> Tensor:
    return zero.float()[..., None] + scale.float()[..., None] * codes


def _least_squares(groups: Tensor, kept: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The zero and scale that fit these codes best, over what is kept."""
    count = kept.sum(-1)
    mean_code = torch.where(kept, codes, 0.0).sum(-1) / count
    mean = torch.where(kept, groups, 0.0).sum(-1) / count
    off_code = torch.where(kept, codes - mean_code[..., None], 0.0)
    spread = (off_code * off_code).sum(-1)
    slope = torch.where(spread > 0, (off_code * (groups - mean[..., None])).sum(-1) / spread, 0.0)
    scale = slope.clamp(SMALLEST_SCALE, LARGEST).half()
    zero = (mean - scale.float() * mean_code).clamp(-LARGEST, LARGEST).half()
    return zero, scale


def _ranges(groups: Tensor, kept: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Zero and scale [...] fp16 from the smallest to the largest of groups [..., group] that is kept."""
    lowest = torch.where(kept, groups, torch.inf).amin(-1)
    highest = torch.where(kept, groups, -torch.inf).amax(-1)
    zero = _half(lowest + 0.0, upwards=False)  # + 0.0: there is one zero
    return zero, _half(((highest - zero.float()) / levels).clamp_min(SMALLEST_SCALE), upwards=True)


def _fitted_ranges(groups: Tensor, kept: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """The best of several widths, each after some of Lloyd's steps."""
    best_zero, best_scale = _ranges(groups, kept, levels)
    whole_zero, whole_scale = best_zero.float(), best_scale.float()
    least = torch.full_like(whole_zero, torch.inf)
    for width in WIDTHS:
        scale = (whole_scale * width).clamp_min(SMALLEST_SCALE).half()
        zero = (whole_zero + (0.5 * levels) * (whole_scale - scale.float())).half()
        for _ in range(STEPS):
            zero, scale = _least_squares(groups, kept, _codes(groups, zero, scale, levels))
        off = torch.where(kept, groups - _backbone(_codes(groups, zero, scale, levels), zero, scale), 0.0)
        error = (off * off).sum(-1)
        is_better = error < least
        least = torch.where(is_better, error, least)
        best_zero, best_scale = torch.where(is_better, zero, best_zero), torch.where(is_better, scale, best_scale)
    return best_zero, best_scale


def _encode_side(x: Tensor, f: GearFormat, values: bool) -> list[Tensor]:
    """The parts of one side of the records of x [..., 128, D] fp32."""

    def turned(matrix: Tensor) -> Tensor:  # [..., 128, D] to [..., vectors, length] and back
        return matrix if values else matrix.transpose(-1, -2)

    vectors = turned(x)
    group = f.width(x.shape[-1]) if values else f.group
    levels = (1 << f.bits) - 1

    order = [(sign * vectors).sort(dim=-1, stable=True).indices[..., : f.outliers // 2] for sign in (-1, 1)]
    indices = torch.cat(order, -1)  # [..., vectors, outliers]: largest, then smallest
    is_outlier = torch.zeros_like(vectors, dtype=torch.bool).scatter(-1, indices, True)

    groups, kept = vectors.unflatten(-1, (-1, group)), ~is_outlier.unflatten(-1, (-1, group))
    zero, scale = (_fitted_ranges if f.fitted else _ranges)(groups, kept, levels)  # [..., vectors, groups]
    codes = _codes(groups, zero, scale, levels)

    left = vectors
    low_rank = [x.new_empty(*x.shape[:-2], 0, *rest) for rest in ((), (BLOCK,), (x.shape[-1],))]
    for turn in range(0 if not f.rank else ROUNDS if f.fitted else 1):
        if turn:
            around = left.unflatten(-1, (-1, group))
            zero, scale = _least_squares(around, kept, _codes(around, zero, scale, levels))
            codes = _codes(around, zero, scale, levels)
        residual = (groups - _backbone(codes, zero, scale)).flatten(-2).masked_fill(is_outlier, 0.0)
        low_rank = _low_rank(turned(residual), f.rank)
        left = vectors - turned(low_rank_values(*low_rank))
    at = indices // group
    outliers = left.gather(-1, indices) - zero.float().gather(-1, at)
    outliers = outliers / scale.float().gather(-1, at) - levels / 2

    return [
        scale.transpose(-1, -2),
        zero.transpose(-1, -2),
        pack_codes(turned(codes.flatten(-2).int()).contiguous(), f.bits, values),
        *low_rank,
        outliers.transpose(-1, -2),
        indices.transpose(-1, -2),
    ]


def gear_encode_reference(
    k: Tensor,
    v: Tensor,
    channels: Tensor,
    bits: int,
    group: int,
    rank: int,
    outliers: int,
    key_channels: int,
    fitted: bool,
) -> Tensor:
    """Plain PyTorch, in fp32: records [B, Hkv, S / 128, record_bytes] uint8. The specification of the kernels.

    Of keys, k has the channels [B, Hkv, S / 128, key_channels] that are kept, or all, and channels is empty then.
    """
    f, head_dim = GearFormat(bits, group, rank, outliers, fitted, key_channels), v.shape[-1]
    parts = []
    for x, values in ((k, False), (v, True)):
        encoded = _encode_side(x.float().unflatten(2, (-1, BLOCK)), f, values)
        encoded.append(channels[..., : 0 if values else key_channels])
        for part, (_, dtype, _) in zip(encoded, f.parts(head_dim, values), strict=True):
            parts.append(part.to(dtype).contiguous().flatten(3).view(torch.uint8))
    record = torch.cat(parts, -1)
    return torch.nn.functional.pad(record, (0, f.record_bytes(head_dim) - record.shape[-1]))


def _fake(k, v, channels, bits, group, rank, outliers, key_channels, fitted) -> Tensor:
    record = GearFormat(bits, group, rank, outliers, fitted, key_channels).record_bytes(v.shape[3])
    return k.new_empty((*k.shape[:2], k.shape[2] // BLOCK, record), dtype=torch.uint8)


_OP = Op(
    "gear_encode",
    "(Tensor k, Tensor v, Tensor channels, int bits, int group, int rank, int outliers, "
    "int key_channels, bool fitted) -> Tensor",
    gear_encode_reference,
    _fake,
)


def check_floats(name: str, tensor: Tensor) -> None:
    check_are_tensors(**{name: tensor})
    check_floating(name, tensor.dtype)
    if tensor.dim() != 4 or tensor.stride(3) != 1:
        raise ValueError(
            f"{name} must have 4 dimensions, the last contiguous, got shape {tuple(tensor.shape)} "
            f"and strides {tensor.stride()}"
        )


def find_unquantisable(k: Tensor, v: Tensor) -> tuple[str, list[int], float] | None:
    """The first value that cannot be quantised, NaN or above LARGEST: "k" or "v", where, and what it is."""
    for name, tensor in (("k", k), ("v", v)):
        good = tensor.abs() <= LARGEST  # not for NaN
        if not good.all():
            place = (~good).nonzero()[0].tolist()
            return name, place, tensor[tuple(place)].item()
    return None


def check_keys_values(k: Tensor, v: Tensor, format: GearFormat) -> None:
    """Raises TypeError or ValueError unless keys and values are whole blocks that can be quantised."""
    check_floats("k", k)
    check_floats("v", v)
    if v.shape != k.shape or v.dtype != k.dtype or v.device != k.device:
        raise ValueError(
            f"v must be like k, {k.dtype} {tuple(k.shape)} on {k.device}, got {v.dtype} {tuple(v.shape)} on {v.device}"
        )
    if k.shape[2] % BLOCK:
        raise ValueError(f"k must have a multiple of {BLOCK} tokens, got {k.shape[2]}")
    format.check_head_dim(k.shape[3])
    if (bad := find_unquantisable(k, v)) is not None:
        name, (sequence, head, position, channel), value = bad
        raise ValueError(
            f"{name} must hold values of at most {LARGEST:.0f} in magnitude, got {value} at sequence {sequence}, "
            f"head {head}, position {position}, channel {channel}"
        )


def gear_encode(k: Tensor, v: Tensor, format: GearFormat, channels: Tensor | None = None) -> Tensor:
    """Quantises keys and values, block by block: a block's record does not depend on what is quantised beside it.

    Args:
        k, v: [B, Hkv, S, D] fp32, fp16 or bf16 and alike, S a multiple of 128, D in HEAD_DIMS.
        format: what to keep.
        channels: [B, Hkv, S / 128, format.key_channels] uint8, ascending: those of the keys that each record keeps.

    Returns:
        [B, Hkv, S / 128, format.record_bytes(D)] uint8.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: a shape, stride or device does not fit, or a value is NaN, infinite or too large for fp16; the
            message names the argument, and where the value is.
    """
    check_keys_values(k, v, format)
    expected = (*k.shape[:2], k.shape[2] // BLOCK, format.key_channels)
    if channels is None and format.key_channels or channels is not None and channels.shape != expected:
        got = None if channels is None else tuple(channels.shape)
        raise ValueError(f"channels must have shape {expected} for {format}, got {got}")
    if channels is not None and (channels.dtype != torch.uint8 or bool((channels >= k.shape[3]).any())):
        raise ValueError(f"channels must be uint8 below the head_dim {k.shape[3]}, got {channels.dtype} {channels}")
    return encode_records(k, v, format, channels)


def encode_records(k: Tensor, v: Tensor, format: GearFormat, channels: Tensor | None = None) -> Tensor:
    """Records of arguments that gear_encode has checked."""
    if not format.key_channels:
        channels = k.new_empty((*k.shape[:2], k.shape[2] // BLOCK, 0), dtype=torch.uint8)
    else:
        at = channels.long()[..., None, :].expand(-1, -1, -1, BLOCK, -1)
        k = k.unflatten(2, (-1, BLOCK)).gather(-1, at).flatten(2, 3)
    return _OP(k, v, channels, *format.layout, format.fitted)
