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


@triton.jit(do_not_specialize_on_alignment=["hidden", "delta", "delta_weight", "weight", "bias", "out"])
def rms_norm_kernel(
    # Pointers
    hidden,  # [rows, size], contiguous rows; with a delta, written
    delta,  # [rows, size] or None
    delta_weight,  # [size]: delta is normalised and scaled before it is added; or None
    weight,  # [groups, size]; row r is scaled by weight r % groups; None: out is the sum itself
    bias,  # [size], added to what has been scaled; or None
    out,  # [rows, size], written
    # Sizes
    size,
    hidden_stride,  # of rows
    groups,
    epsilon,
    hidden_scale,  # of the sum with delta
    # Constants
    BLOCK: tl.constexpr,  # a power of two, at least size
    CENTRED: tl.constexpr,  # whether the mean of a row is taken off first
    IS_EARLY: tl.constexpr,
):
    row = tl.program_id(0)
    start, hidden_start = row.to(tl.int64) * size, row.to(tl.int64) * hidden_stride
    column = tl.arange(0, BLOCK)
    used = column < size
    if weight is not None:
        weights = tl.load(weight + row % groups * size + column, mask=used, other=0.0)
    if delta_weight is not None:
        delta_weights = tl.load(delta_weight + column, mask=used, other=0.0)
    if bias is not None:
        biases = tl.load(bias + column, mask=used, other=0.0)
    wait_for_earlier(IS_EARLY)
    x = tl.load(hidden + hidden_start + column, mask=used, other=0.0)
    if delta is not None:
        change = tl.load(delta + start + column, mask=used, other=0.0)
        if delta_weight is not None:
            change *= 1.0 / tl.sqrt(tl.sum(change * change, 0) / size + epsilon)
            change *= delta_weights
        x = (x + change) * hidden_scale
        tl.store(hidden + hidden_start + column, x, mask=used)
    if CENTRED:
        x = tl.where(used, x - tl.sum(x, 0) / size, 0.0)
    if weight is not None:
        scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / size + epsilon)
        x = x * scale * weights
    if bias is not None:
        x += biases
    tl.store(out + start + column, x.to(out.dtype.element_ty), mask=used)


def compile_options(block: int) -> dict:
    """The number of rows must never change them: the row rule."""
    return {"num_warps": max(1, min(16, block // 256)), "enable_fp_fusion": False}


def rms_norm(hidden, delta, weight, epsilon, out_dtype, delta_weight=None, bias=None, centred=False, hidden_scale=1.0):
    """Launches the kernel; arguments and result of torch.ops.pyspec.rms_norm."""
    rows, size = hidden.shape
    groups = weight.shape[0] if weight is not None and weight.dim() == 2 else 1
    out = hidden.new_empty(hidden.shape, dtype=out_dtype)
    if out.numel():
        given = [None if tensor is None else tensor.contiguous() for tensor in (delta, delta_weight, weight, bias)]
        block = triton.next_power_of_2(size)
        options = {"CENTRED": centred, **compile_options(block), **launch_options(hidden.device)}
        with torch.cuda.device_of(hidden):
            sizes = (size, hidden.stride(0), groups, epsilon, float(hidden_scale))
            rms_norm_kernel[(rows,)](hidden, *given, out, *sizes, BLOCK=block, **options)
    return out
