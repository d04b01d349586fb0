"""block_masked_attention: attention that knows its mask, for any mask.

For row i with visible keys V(i), as a BlockMask has them,

    out[i] = sum over j in V(i) of softmax(scale * q[i] . k[j]) v[j],    scores optionally capped: c tanh(score / c).

The kernels go through two lists for each row block: key tiles that all its rows see whole, whose mask is never read,
and tiles that are partly seen, with their bits. Other tiles cost nothing. A row that sees no key gives 0 and lse -inf.

Gradients flow to q, k and v, from out and from lse. With p[i, j] = exp(score[i, j] - lse[i]) computed anew,

    dv[j] = sum over i of p[i, j] dout[i]
    ds[i, j] = p[i, j] (dout[i] . v[j] - dout[i] . out[i] + dlse[i]),  times 1 - (score / c)^2 where capped
    dq[i] = scale * sum over j of ds[i, j] k[j],    dk[j] = scale * sum over i of ds[i, j] q[i],

over the pairs that the mask has, through the same two lists. See docs/block_masked_attention.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyspec.masks import BlockMask
from pyspec.ops._library import Op
from pyspec.ops.tree_attention import check_attention, dense_attention

_MASK = (
    "Tensor full_ranges, Tensor full_tiles, Tensor partial_ranges, Tensor partial_tiles, Tensor bits, "
    "Tensor? row_order, Tensor? key_order"
)


def _visible(q, k, full_ranges, full_tiles, partial_ranges, partial_tiles, bits, row_order, key_order) -> Tensor:
    """What rows see, [B, Hkv, group, N, M] bool."""
    heads, rows, kv_heads, keys = q.shape[1], q.shape[2], k.shape[1], k.shape[2]
    mask = BlockMask(rows, keys, full_ranges, full_tiles, partial_ranges, partial_tiles, bits)
    mask.row_order, mask.key_order = row_order, key_order
    visible = mask.to_dense().expand(q.shape[0], heads, rows, keys)
    return visible.unflatten(1, (kv_heads, heads // kv_heads))


def block_masked_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    full_ranges: Tensor,
    full_tiles: Tensor,
    partial_ranges: Tensor,
    partial_tiles: Tensor,
    bits: Tensor,
    row_order: Tensor | None,
    key_order: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch, in fp32: out like q and lse [B, Hq, N]. The specification of the kernels."""
    mask = (full_ranges, full_tiles, partial_ranges, partial_tiles, bits, row_order, key_order)
    return dense_attention(q, k, v, _visible(q, k, *mask), scale, softcap)


def block_masked_attention_backward_reference(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    full_ranges: Tensor,
    full_tiles: Tensor,
    partial_ranges: Tensor,
    partial_tiles: Tensor,
    bits: Tensor,
    row_order: Tensor | None,
    key_order: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch, in fp32 (or float64, if q is): dq, dk and dv. The specification of the kernels."""
    visible = _visible(q, k, full_ranges, full_tiles, partial_ranges, partial_tiles, bits, row_order, key_order)
    wide = torch.promote_types(q.dtype, torch.float32)
    sees, is_seen = visible.any(-1), visible.any(3).any(2)  # others could be NaN, and hide nothing from the products

    def by_group(rows):
        return torch.where(sees[..., None], rows.to(wide).unflatten(1, sees.shape[1:3]), 0.0)

    rows_q, rows_out, rows_d_out = by_group(q), by_group(out), by_group(d_out)
    keys, values = (torch.where(is_seen[..., None], cache.to(wide), 0.0) for cache in (k, v))
    scores = torch.einsum("bhgnd,bhmd->bhgnm", rows_q, keys) * scale
    slope = scale
    if softcap is not None:
        share = torch.tanh(scores / softcap)
        scores, slope = softcap * share, scale * (1.0 - share * share)
    weights = torch.where(visible, torch.exp(scores - lse.to(wide).unflatten(1, sees.shape[1:3])[..., None]), 0.0)
    constant = (rows_d_out * rows_out).sum(-1, keepdim=True)
    if d_lse is not None:
        constant = constant - d_lse.to(wide).unflatten(1, sees.shape[1:3])[..., None]
    d_weights = torch.einsum("bhgnd,bhmd->bhgnm", rows_d_out, values)
    d_scores = torch.where(visible, weights * (d_weights - constant) * slope, 0.0)
    d_q = torch.einsum("bhgnm,bhmd->bhgnd", d_scores, keys).flatten(1, 2)
    d_k = torch.einsum("bhgnm,bhgnd->bhmd", d_scores, rows_q)
    d_v = torch.einsum("bhgnm,bhgnd->bhmd", weights, rows_d_out)
    return tuple(torch.empty_like(x).copy_(d_x) for x, d_x in ((q, d_q), (k, d_k), (v, d_v)))


def _fake(q, k, v, full_ranges, full_tiles, partial_ranges, partial_tiles, bits, row_order, key_order, scale, softcap):
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _fake_backward(d_out, d_lse, q, k, v, *others):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _triton():
    from pyspec.kernels.block_masked_attention import block_masked_attention as launch

    return launch


def _triton_backward():
    from pyspec.kernels.block_masked_attention_backward import block_masked_attention_backward as launch

    return launch


def _refuse_twice(ctx, *gradients):
    raise RuntimeError("gradients of block_masked_attention have none: it is differentiable once")


_BACKWARD = Op(
    "block_masked_attention_backward",
    f"(Tensor d_out, Tensor? d_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_MASK}, float scale, "
    "float? softcap) -> (Tensor, Tensor, Tensor)",
    block_masked_attention_backward_reference,
    _fake_backward,
    _triton_backward,
    gradient=(lambda ctx, inputs, output: None, _refuse_twice),
)


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.softcap = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])
    ctx.set_materialize_grads(False)


def _backward(ctx, d_out, d_lse):
    q, *others = ctx.saved_tensors
    if d_out is None:
        d_out = torch.zeros_like(q)
    gradients = _BACKWARD(d_out, d_lse, q, *others, ctx.scale, ctx.softcap)
    return (*gradients, *[None] * 9)


_OP = Op(
    "block_masked_attention",
    f"(Tensor q, Tensor k, Tensor v, {_MASK}, float scale, float? softcap) -> (Tensor, Tensor)",
    block_masked_attention_reference,
    _fake,
    _triton,
    gradient=(_setup, _backward),
)


def _check(q, k, v, mask, scale, softcap) -> None:
    check_attention(q, k, v, scale, softcap)
    batch, heads, rows, _ = q.shape
    if k.shape[0] != batch:
        raise ValueError(f"k must have batch {batch} like q, got shape {tuple(k.shape)}")
    if not isinstance(mask, BlockMask):
        raise TypeError(f"mask must be a BlockMask, got {type(mask).__name__}")
    if (mask.rows, mask.keys) != (rows, k.shape[2]):
        raise ValueError(
            f"mask must have {rows} rows like q and {k.shape[2]} keys like k, got {mask.rows} and {mask.keys}"
        )
    mask_batch, mask_heads = mask.full_ranges.shape[:2]
    if mask_batch not in (1, batch) or mask_heads not in (1, heads):
        raise ValueError(
            f"mask must be for 1 or {batch} batch entries and 1 or {heads} heads, got {mask_batch} and {mask_heads}"
        )
    if mask.bits.device != q.device:
        raise ValueError(f"mask must be on {q.device} like q, got {mask.bits.device}")
    if not torch.compiler.is_compiling():
        mask.check_current()


def block_masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each row to the keys that the mask lets it see. Differentiable, once, with respect to q, k and v.

    Args:
        q: [B, Hq, N, D] fp32, fp16 or bf16; D in HEAD_DIMS; any strides with a contiguous last dimension.
        k, v: [B, Hkv, M, D]. Hq % Hkv == 0.
        mask: N rows and M keys, for all batch entries and query heads or one for each, on q's device.
        scale: factor of the scores, positive; 1 / sqrt(D) by default.
        softcap: scores become softcap * tanh(scores / softcap).
        return_lse: also return the natural log-sum-exp of the scores.

    Returns:
        out like q, 0 where a row sees no key; with return_lse also lse [B, Hq, N] fp32, -inf there. Sums are kept in
        fp32. What a key holds that a row does not see changes no bit of that row, NaN or not, nor of its gradient.

    Raises:
        TypeError: a dtype is not supported, or mask is not a BlockMask.
        ValueError: a shape, stride, device or option does not fit, or mask was built from a dense tensor that has been
            edited since; the message names the argument.
    """
    _check(q, k, v, mask, scale, softcap)
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[-1])
    lists = (mask.full_ranges, mask.full_tiles, mask.partial_ranges, mask.partial_tiles, mask.bits)
    out, lse = _OP(q, k, v, *lists, mask.row_order, mask.key_order, scale, softcap)
    return (out, lse) if return_lse else out
