"""rms_norm on the GPU: the residual stream takes a layer's output in and is normalised, in one walk.

One program per row, which stays in registers between the sum of squares and the division. Bound by memory.
Row rule: a row is one program, and nothing about a row's place in memory is specialised on, so every row is summed
by the same code in the same layout.
"""

import torch

import triton
import triton.language as tl
from pyspec.kernels.early_launch import launch_options, wait_for_earlier

__all__ = ["compile_options", "rms_norm", "rms_norm_kernel"]


@triton.jit(do_not_specialize_on_alignment=["hidden", "delta", "weight", "out"])
def rms_norm_kernel(
    # Pointers
    hidden,  # [rows, size]; with a delta, written
    delta,  # [rows, size] or None
    weight,  # [groups, size]; row r is scaled by weight r % groups
    out,  # [rows, size], written
    # Sizes
    size,
    groups,
    epsilon,
    # Constants
    BLOCK: tl.constexpr,  # a power of two, at least size
    IS_EARLY: tl.constexpr,
):
    row = tl.program_id(0)
    start = row.to(tl.int64) * size
    column = tl.arange(0, BLOCK)
    used = column < size
    weights = tl.load(weight + row % groups * size + column, mask=used, other=0.0)
    wait_for_earlier(IS_EARLY)
    x = tl.load(hidden + start + column, mask=used, other=0.0)
    if delta is not None:
        x += tl.load(delta + start + column, mask=used, other=0.0)
        tl.store(hidden + start + column, x, mask=used)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / size + epsilon)
    tl.store(out + start + column, (x * scale * weights).to(out.dtype.element_ty), mask=used)


def compile_options(block: int) -> dict:
    """The number of rows must never change them: the row rule."""
    return {"num_warps": max(1, min(16, block // 256)), "enable_fp_fusion": False}


def rms_norm(hidden, delta, weight, epsilon, out_dtype):
    """Launches the kernel; arguments and result of torch.ops.pyspec.rms_norm."""
    rows, size = hidden.shape
    groups = weight.shape[0] if weight.dim() == 2 else 1
    out = torch.empty_like(hidden, dtype=out_dtype)
    if out.numel():
        delta = None if delta is None else delta.contiguous()
        block = triton.next_power_of_2(size)
        options = {**compile_options(block), **launch_options(hidden.device)}
        with torch.cuda.device_of(hidden):
            rms_norm_kernel[(rows,)](
                hidden, delta, weight.contiguous(), out, size, groups, epsilon, BLOCK=block, **options
            )
    return out
