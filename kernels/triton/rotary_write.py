"""rotary_write on the GPU: queries and keys are turned to their positions; keys and values go to their cache slots.

One program per (row, head): a query's goes to the result, a key's or value's to the cache. Places are read on the
device. Bound by memory: every number is read once, in fp32, and written once. A norm over all heads of a row is worked
out by each of their programs, which find the row in the cache.
"""

import torch

import triton
import triton.language as tl
from pyspec.kernels.early_launch import launch_options, wait_for_earlier

__all__ = ["OPTIONS", "rotary_write", "rotary_write_kernel"]

OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}


SUMMED = tl.constexpr(256)  # squares at a time


@triton.jit
def _scale_of(first, count, epsilon):
    """What `count` values from first on are divided by their root mean square with."""
    place = tl.arange(0, SUMMED)
    squares = tl.zeros((SUMMED,), dtype=tl.float32)
    for start in range(0, count, SUMMED):
        value = tl.load(first + start + place, mask=start + place < count, other=0.0)
        squares += value * value
    return 1.0 / tl.sqrt(tl.sum(squares, 0) / count + epsilon)


@triton.jit
def rotary_write_kernel(
    # Pointers
    qkv,  # [rows, (HEADS + 2 KV_HEADS) * HEAD_DIM]
    cos_sin,  # [positions, 2, WIDTH / 2]
    norm,  # [2 or HEADS + KV_HEADS, HEAD_DIM], weights of queries' norms, then of keys'; or None
    query_scales,  # [positions] or None: what turned queries are multiplied by
    positions,  # [rows]
    sequences,  # [rows]
    slots,  # [rows]
    q,  # [rows, HEADS, HEAD_DIM], written
    keys,  # [sequences, KV_HEADS, slots, HEAD_DIM], written
    values,  # like keys, written
    # Strides
    stride_qkv,
    stride_k_sequence,
    stride_k_head,
    stride_k_slot,
    stride_v_sequence,
    stride_v_head,
    stride_v_slot,
    # Sizes
    epsilon,
    # Constants
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,  # of a head's dimensions, the first that are turned
    IS_WHOLE: tl.constexpr,  # whether the heads of a row are normalised together
    NORMS_VALUES: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two, at least half of WIDTH
    REST: tl.constexpr,  # a power of two, at least HEAD_DIM - WIDTH; 0 where they are the same
    IS_EARLY: tl.constexpr,
):
    wait_for_earlier(IS_EARLY)
    HALF: tl.constexpr = WIDTH // 2
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, BLOCK)
    used = dims < HALF
    source = qkv + row * stride_qkv + head * HEAD_DIM + dims
    x = tl.load(source, mask=used)
    y = tl.load(source + HALF, mask=used)
    if REST:
        behind = tl.arange(0, REST)
        is_behind = behind < HEAD_DIM - WIDTH
        rest_source = qkv + row * stride_qkv + head * HEAD_DIM + WIDTH + behind
        rest = tl.load(rest_source, mask=is_behind)
    if norm is not None:
        if head < HEADS + KV_HEADS:
            is_query = head < HEADS
            first, count, weight = head, 1, norm + tl.where(is_query, 0, HEAD_DIM)
            if IS_WHOLE:
                first, count = tl.where(is_query, 0, HEADS), tl.where(is_query, HEADS, KV_HEADS)
                weight = norm + head * HEAD_DIM
            scale = _scale_of(qkv + row * stride_qkv + first * HEAD_DIM, count * HEAD_DIM, epsilon)
            x *= scale * tl.load(weight + dims, mask=used)
            y *= scale * tl.load(weight + HALF + dims, mask=used)
            if REST:
                rest *= scale * tl.load(weight + WIDTH + behind, mask=is_behind)
    if NORMS_VALUES:
        if head >= HEADS + KV_HEADS:
            scale = _scale_of(qkv + row * stride_qkv + head * HEAD_DIM, HEAD_DIM, epsilon)
            x *= scale
            y *= scale
            if REST:
                rest *= scale
    if head < HEADS + KV_HEADS:
        angles = cos_sin + tl.load(positions + row).to(tl.int64) * WIDTH + dims
        cos, sin = tl.load(angles, mask=used), tl.load(angles + HALF, mask=used)
        x, y = x * cos - y * sin, y * cos + x * sin
    if query_scales is not None:
        if head < HEADS:
            factor = tl.load(query_scales + tl.load(positions + row))
            x *= factor
            y *= factor
            if REST:
                rest *= factor

    sequence, slot = tl.load(sequences + row).to(tl.int64), tl.load(slots + row).to(tl.int64)
    if head < HEADS:
        target = q + (row * HEADS + head) * HEAD_DIM
    elif head < HEADS + KV_HEADS:
        target = keys + sequence * stride_k_sequence + (head - HEADS) * stride_k_head + slot * stride_k_slot
    else:
        kv_head = head - HEADS - KV_HEADS
        target = values + sequence * stride_v_sequence + kv_head * stride_v_head + slot * stride_v_slot
    tl.store(target + dims, x.to(q.dtype.element_ty), mask=used)
    tl.store(target + HALF + dims, y.to(q.dtype.element_ty), mask=used)
    if REST:
        tl.store(target + WIDTH + behind, rest.to(q.dtype.element_ty), mask=is_behind)


def rotary_write(
    qkv,
    cos_sin,
    positions,
    sequences,
    slots,
    keys,
    values,
    heads,
    norm=None,
    epsilon=0.0,
    query_scales=None,
    norm_values=False,
):
    """Launches the kernel; arguments and result of torch.ops.pyspec.rotary_write.

    Nothing waits for the device and the grid comes from shapes alone, so a CUDA graph can capture the call.
    """
    rows, (_, kv_heads, _, head_dim) = len(qkv), keys.shape
    q = keys.new_empty((rows, heads, head_dim))
    if rows:
        width, norm = 2 * cos_sin.shape[2], None if norm is None else norm.contiguous()
        qkv = qkv if qkv.stride(1) == 1 else qkv.contiguous()
        inputs = [qkv, cos_sin, norm, query_scales]
        inputs += [*(tensor.contiguous() for tensor in (positions, sequences, slots))]
        strides = (qkv.stride(0), *keys.stride()[:3], *values.stride()[:3])
        constants = {"HEADS": heads, "KV_HEADS": kv_heads, "HEAD_DIM": head_dim}
        constants |= {"WIDTH": width, "IS_WHOLE": norm is not None and len(norm) > 2}
        constants["NORMS_VALUES"] = norm_values
        constants["BLOCK"] = triton.next_power_of_2(width // 2)
        constants["REST"] = triton.next_power_of_2(head_dim - width) if width < head_dim else 0
        with torch.cuda.device_of(qkv):
            rotary_write_kernel[(rows, heads + 2 * kv_heads)](
                *inputs, q, keys, values, *strides, epsilon, **constants, **OPTIONS, **launch_options(qkv.device)
            )
    return q
