"""swiglu on the GPU: activation(gate) * up, in fp32, rounded once; gelu_tanh is gate times a sigmoid, as silu is.

Clamped, gates are at most 7 and ups within -7 and 7; a sigmoid has 1 in the place of the gate; relu and none have no
exponential, and gelu is the exact one, by erf.

One program per (row, 1024 columns). Bound by memory.
"""

import torch

import triton
import triton.language as tl
from pyspec.kernels.early_launch import launch_options, wait_for_earlier

__all__ = ["OPTIONS", "swiglu", "swiglu_kernel"]

BLOCK = tl.constexpr(1024)
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def swiglu_kernel(
    gates,  # [rows, size]
    ups,  # [rows, size]
    out,  # [rows, size], written
    size,
    gate_stride,  # of rows
    up_stride,
    IS_GELU: tl.constexpr,
    IS_CLAMPED: tl.constexpr,
    IS_SIGMOID: tl.constexpr,
    IS_RELU: tl.constexpr,
    IS_NONE: tl.constexpr,
    IS_ERF: tl.constexpr,  # the exact GELU
    IS_EARLY: tl.constexpr,
):
    wait_for_earlier(IS_EARLY)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    used = column < size
    gate = tl.load(gates + row * gate_stride + column, mask=used, other=0.0)
    up = tl.load(ups + row * up_stride + column, mask=used, other=0.0).to(tl.float32)
    if IS_CLAMPED:  # what is NaN stays so
        gate = tl.where(gate > 7.0, 7.0, gate)
        up = tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up)) + 1.0
    turned = gate
    if IS_CLAMPED:
        turned = 1.702 * gate
    if IS_GELU:
        turned = 1.59576912 * gate * (1.0 + 0.044715 * gate * gate)
    if IS_SIGMOID:
        gate = tl.full(gate.shape, 1.0, tl.float32)
    if IS_RELU:  # what is NaN stays so
        gate = tl.where(gate < 0.0, 0.0, gate)
    if IS_RELU or IS_NONE:
        activated = gate
    elif IS_ERF:
        activated = 0.5 * gate * (1.0 + tl.erf(0.70710678 * gate))
    else:
        activated = gate / (1.0 + tl.exp(-turned))
    tl.store(out + row * size + column, (activated * up).to(out.dtype.element_ty), mask=used)


def swiglu(gate_up, out_dtype, activation=0, up=None):
    """Launches the kernel; arguments and result of torch.ops.pyspec.swiglu."""
    gate_up = gate_up if gate_up.stride(1) == 1 else gate_up.contiguous()
    rows, size = gate_up.shape[0], gate_up.shape[1] // (2 if up is None else 1)
    up = gate_up[:, size:] if up is None else up if up.stride(1) == 1 else up.contiguous()
    out = gate_up.new_empty((rows, size), dtype=out_dtype)
    if out.numel():
        grid = (rows, triton.cdiv(size, BLOCK.value))
        with torch.cuda.device_of(gate_up):
            options = {
                "IS_GELU": activation == 1,
                "IS_CLAMPED": activation == 2,
                "IS_SIGMOID": activation == 3,
                "IS_RELU": activation == 4,
                "IS_NONE": activation == 5,
                "IS_ERF": activation == 6,
                **OPTIONS,
                **launch_options(gate_up.device),
            }
            swiglu_kernel[grid](gate_up, up, out, size, gate_up.stride(0), up.stride(0), **options)
    return out
