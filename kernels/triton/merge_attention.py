"""merge_attention on the GPU: two attentions over disjoint keys become one.

One program per 16 rows. Weights are in registers; both outputs are streamed past once, 64 columns at a time.
Bound by memory: two rows read and one written, a few operations a value.
"""

import torch

import triton
import triton.language as tl

__all__ = ["merge_attention", "merge_kernel"]

ROWS = tl.constexpr(16)
COLUMNS = tl.constexpr(64)


@triton.jit(do_not_specialize=["rows"])
def merge_kernel(
    # Pointers
    out_a,  # [rows, D]
    lse_a,  # [rows]
    out_b,  # [rows, D]
    lse_b,  # [rows]
    out,  # [rows, D], written
    lse,  # [rows], written
    # Sizes
    rows,
    # Constants
    HEAD_DIM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    used = row < rows
    a = tl.load(lse_a + row, mask=used, other=float("-inf"))
    b = tl.load(lse_b + row, mask=used, other=float("-inf"))
    largest = tl.maximum(a, b)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    weight_a, weight_b = tl.exp(a - shift), tl.exp(b - shift)
    total = weight_a + weight_b
    total = tl.where(total == 0.0, 1.0, total)  # both empty: 0 and -inf
    tl.store(lse + row, largest + tl.log(total), mask=used)
    for first in tl.static_range(0, HEAD_DIM, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        offsets = row[:, None] * HEAD_DIM + column[None, :]
        mask = used[:, None] & (column < HEAD_DIM)[None, :]
        # A part without weight may hold anything, NaN included: it is not even loaded.
        part_a = tl.load(out_a + offsets, mask=mask & (weight_a != 0.0)[:, None], other=0.0).to(tl.float32)
        part_b = tl.load(out_b + offsets, mask=mask & (weight_b != 0.0)[:, None], other=0.0).to(tl.float32)
        merged = (part_a * weight_a[:, None] + part_b * weight_b[:, None]) / total[:, None]
        tl.store(out + offsets, merged.to(out.dtype.element_ty), mask=mask)


def merge_attention(out_a, lse_a, out_b, lse_b):
    """Launches the kernel; arguments and results of torch.ops.pyspec.merge_attention."""
    out, lse = out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)
    if lse.numel():
        inputs = [tensor.contiguous() for tensor in (out_a, lse_a, out_b, lse_b)]
        with torch.cuda.device_of(out):
            grid = (triton.cdiv(lse.numel(), ROWS.value),)
            merge_kernel[grid](*inputs, out, lse, lse.numel(), HEAD_DIM=out.shape[-1], enable_fp_fusion=False)
    return out, lse
