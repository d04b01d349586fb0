"""rotary_write on the GPU: queries and keys are turned to their positions; keys and values go to their cache slots.

One program per (row, head): a query's goes to the result, a key's or value's to the cache. Places are read on the
device. Bound by memory: every number is read once, in fp32, and written once.
"""

import torch

import triton
import triton.language as tl
from pyspec.kernels.early_launch import launch_options, wait_for_earlier

__all__ = ["OPTIONS", "rotary_write", "rotary_write_kernel"]

OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}


@triton.jit
def rotary_write_kernel(
    # Pointers
    qkv,  # [rows, HEADS + 2 KV_HEADS, HEAD_DIM]
    cos_sin,  # [positions, 2, HEAD_DIM / 2]
    positions,  # [rows]
    sequences,  # [rows]
    slots,  # [rows]
    q,  # [rows, HEADS, HEAD_DIM], written
    keys,  # [sequences, KV_HEADS, slots, HEAD_DIM], written
    values,  # like keys, written
    # Strides
    stride_k_sequence,
    stride_k_head,
    stride_k_slot,
    stride_v_sequence,
    stride_v_head,
    stride_v_slot,
    # Constants
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two, at least half of HEAD_DIM
    IS_EARLY: tl.constexpr,
):
    wait_for_earlier(IS_EARLY)
    HALF: tl.constexpr = HEAD_DIM // 2
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, BLOCK)
    used = dims < HALF
    source = qkv + (row * (HEADS + 2 * KV_HEADS) + head) * HEAD_DIM + dims
    x = tl.load(source, mask=used)
    y = tl.load(source + HALF, mask=used)
    if head < HEADS + KV_HEADS:
        angles = cos_sin + tl.load(positions + row).to(tl.int64) * HEAD_DIM + dims
        cos, sin = tl.load(angles, mask=used), tl.load(angles + HALF, mask=used)
        x, y = x * cos - y * sin, y * cos + x * sin

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


def rotary_write(qkv, cos_sin, positions, sequences, slots, keys, values, heads):
    """Launches the kernel; arguments and result of torch.ops.pyspec.rotary_write.

    Nothing waits for the device and the grid comes from shapes alone, so a CUDA graph can capture the call.
    """
    rows, (_, kv_heads, _, head_dim) = len(qkv), keys.shape
    q = keys.new_empty((rows, heads, head_dim))
    if rows:
        inputs = [tensor.contiguous() for tensor in (qkv, cos_sin, positions, sequences, slots)]
        strides = (*keys.stride()[:3], *values.stride()[:3])
        constants = {"HEADS": heads, "KV_HEADS": kv_heads, "HEAD_DIM": head_dim}
        constants["BLOCK"] = triton.next_power_of_2(head_dim // 2)
        with torch.cuda.device_of(qkv):
            rotary_write_kernel[(rows, heads + 2 * kv_heads)](
                *inputs, q, keys, values, *strides, **constants, **OPTIONS, **launch_options(qkv.device)
            )
    return q
