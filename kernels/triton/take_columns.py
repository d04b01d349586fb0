"""take_columns on the GPU: the columns of x in another order.

One program per (row, 1024 columns). Bound by memory; a row is small, and stays in the caches.
"""

import torch

import triton
import triton.language as tl
from pyspec.kernels.early_launch import launch_options, wait_for_earlier

__all__ = ["OPTIONS", "take_columns", "take_columns_kernel"]

BLOCK = tl.constexpr(1024)
OPTIONS = {"num_warps": 4}


@triton.jit
def take_columns_kernel(
    x,  # [rows, columns]
    order,  # int32 [columns]
    out,  # [rows, columns], written
    columns,
    stride_x,
    IS_EARLY: tl.constexpr,
):
    wait_for_earlier(IS_EARLY)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    used = column < columns
    values = tl.load(x + row * stride_x + tl.load(order + column, mask=used, other=0), mask=used, other=0.0)
    tl.store(out + row * columns + column, values, mask=used)


def take_columns(x, order):
    """Launches the kernel; arguments and result of torch.ops.pyspec.take_columns."""
    rows, columns = x.shape
    out = x.new_empty((rows, columns))
    if out.numel():
        with torch.cuda.device_of(x):
            options = {**OPTIONS, **launch_options(x.device)}
            take_columns_kernel[(rows, triton.cdiv(columns, BLOCK.value))](
                x, order, out, columns, x.stride(0), **options
            )
    return out
