"""linear on the GPU: x times a packed weight transposed, in one order of summation for every number of rows.

One program per (block of rows of x, block of outputs, split of the inputs). Its sums stay in registers; tiles of the
weight and of x are streamed past them through shared memory. A second kernel adds the splits in order, then the bias.
Bound by reading the weight; splits put enough programs in flight for that where there are few outputs. Programs ask
for the first of it while the small kernels in front of them still run.
Row rule: tiles and splits come from the weight alone. The weight is the left operand of the tensor cores and a row of
x a column of the right one: it never meets its neighbours, whatever block and place it falls in.
int8: group g of 32 inputs is an exact integer product times both scales, summed in order of g by lane g % 4 of a
program; the four lanes are added at the end. x is rounded in registers, by every program anew: no third kernel.
"""

import torch

import triton
import triton.language as tl
from pyspec.kernels.early_launch import launch_options, wait_for_earlier

__all__ = ["INT8_OPTIONS", "OPTIONS", "float_kernel", "int8_kernel", "linear", "split", "sum_kernel", "tile_of"]

GROUP = tl.constexpr(32)  # inputs that share a scale
LANES = tl.constexpr(4)  # groups of an int8 tile, each the work of two warps, or of one
STAGES = tl.constexpr(3)  # tiles in flight or in use: four programs of floats, two of int8, fit a multiprocessor
LINES = tl.constexpr(4)  # of 128 bytes
SUM_BLOCK = tl.constexpr(256)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: added to a small float, it leaves the nearest integer in the low bits
# Outputs of all programs together: four programs of floats, or two of int8, on each multiprocessor of a large GPU.
IN_FLIGHT = 32768
MOST_SPLITS = 32
MOST_ROWS = 512  # of a launch, which bounds the memory of the splits' sums
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
# Before 3.9, Triton has each of two warps do all the work of their lane.
SHARES_LANES = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
INT8_OPTIONS = {**OPTIONS, "num_warps": 8 if SHARES_LANES else 4}


@triton.jit
def prefetch(weight, stride, column, outputs, first, inputs, IS_EARLY: tl.constexpr):
    """Has the first LINES lines of a program's rows of the weight brought into the L2 cache, while others finish."""
    if IS_EARLY:
        LINE: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth
        k = tl.minimum(first + tl.arange(0, LINES) * LINE, inputs - 1)
        places = (weight + tl.minimum(column, outputs - 1).to(tl.int64)[:, None] * stride + k[None, :]).to(tl.int64)
        asm: tl.constexpr = "prefetch.global.L2 [$1]; mov.b32 $0, 0;"
        tl.inline_asm_elementwise(asm, "=r,l", [places], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def store_sums(sums, out, bias, row, column, rows, outputs, IS_WHOLE: tl.constexpr):
    """Sums [OUTPUTS, ROWS] to out: of all inputs, with the bias, or of one split."""
    mask = (column < outputs)[:, None] & (row < rows)[None, :]
    if IS_WHOLE:
        if bias is not None:
            sums += tl.load(bias + column, mask=column < outputs, other=0.0)[:, None]
    else:
        out += tl.program_id(2).to(tl.int64) * rows * outputs
    offsets = row.to(tl.int64)[None, :] * outputs + column[:, None]
    tl.store(out + offsets, sums.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "split_tiles"])
def float_kernel(
    x,  # [rows, inputs]
    weight,  # [outputs, inputs]
    bias,  # [outputs] or None
    out,  # [rows, outputs], or sums of splits [splits, rows, outputs], written
    rows,
    outputs,
    inputs,
    split_tiles,
    stride_x,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    UPCAST: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    within = tl.arange(0, INPUTS)
    x_rows = x + row.to(tl.int64)[:, None] * stride_x
    weight_rows = weight + column.to(tl.int64)[:, None] * inputs
    row_used, column_used = (row < rows)[:, None], (column < outputs)[:, None]
    first_tile = tl.program_id(2) * split_tiles
    end_tile = tl.minimum(first_tile + split_tiles, tl.cdiv(inputs, INPUTS))
    prefetch(weight, inputs, column, outputs, first_tile * INPUTS, inputs, IS_EARLY)
    wait_for_earlier(IS_EARLY)
    sums = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for tile in tl.range(first_tile, end_tile, num_stages=STAGES):
        k = tile * INPUTS + within
        k_used = (k < inputs)[None, :]
        w = tl.load(weight_rows + k[None, :], mask=column_used & k_used, other=0.0)
        values = tl.load(x_rows + k[None, :], mask=row_used & k_used, other=0.0)
        if UPCAST:
            w, values = w.to(tl.float32), values.to(tl.float32)
        sums = tl.dot(w, tl.trans(values), sums, input_precision="ieee")
    store_sums(sums, out, bias, row, column, rows, outputs, IS_WHOLE)


@triton.jit
def round_groups(values):
    """fp32 [..., GROUP] as int8 and scales [...]; the scale of a group that is not finite is NaN."""
    # As bits the sizes keep their order and NaN is the largest, which a maximum of floats would drop.
    bits = tl.max(tl.abs(values).to(tl.int32, bitcast=True), 2)
    largest = bits.to(tl.float32, bitcast=True)
    factor = tl.math.div_rn(127.0, tl.maximum(largest, 4e-37))  # which keeps it finite
    integers = (values * factor[:, :, None] + ROUND).to(tl.int32, bitcast=True).to(tl.int8)
    return integers, tl.where(largest < float("inf"), tl.math.div_rn(largest, 127.0), float("nan"))


@triton.jit(do_not_specialize=["rows", "split_tiles"])
def int8_kernel(
    x,  # [rows, inputs]
    weight,  # int8 [outputs, groups * GROUP]
    scales,  # fp16 [outputs, groups], filled up with zeros to eights
    bias,  # [outputs] or None
    out,  # [rows, outputs], or sums of splits [splits, rows, outputs], written
    rows,
    outputs,
    inputs,
    split_tiles,
    stride_x,
    stride_weight,  # in units of 16 bytes, so that the compiler sees the alignment
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,  # LANES * GROUP
    IS_WHOLE: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    lane, within = tl.arange(0, LANES), tl.arange(0, GROUP)
    x_rows = x + row.to(tl.int64)[None, :, None] * stride_x
    weight_rows = weight + column.to(tl.int64)[None, :, None] * (stride_weight * 16)
    scale_rows = scales + column.to(tl.int64)[None, :] * (stride_weight * 8)
    row_used, column_used = (row < rows)[None, :, None], (column < outputs)[None, :]
    groups = tl.cdiv(inputs, GROUP)
    first_tile = tl.program_id(2) * split_tiles
    end_tile = tl.minimum(first_tile + split_tiles, tl.cdiv(groups, LANES))
    prefetch(weight, stride_weight * 16, column, outputs, first_tile * INPUTS, inputs, IS_EARLY)
    wait_for_earlier(IS_EARLY)
    sums = tl.zeros([LANES, OUTPUTS, ROWS], tl.float32)
    for tile in tl.range(first_tile, end_tile, num_stages=STAGES):
        group = tile * LANES + lane
        k = group[:, None, None] * GROUP + within[None, None, :]
        used = column_used & (group < groups)[:, None]
        w = tl.load(weight_rows + k, mask=used[:, :, None], other=0)
        w_scale = tl.load(scale_rows + group[:, None], mask=column_used, other=0.0).to(tl.float32)
        values = tl.load(x_rows + k, mask=row_used & (k < inputs), other=0.0).to(tl.float32)
        integers, x_scale = round_groups(values)
        dots = tl.dot(w, tl.permute(integers, (0, 2, 1)), out_dtype=tl.int32).to(tl.float32)
        sums = tl.fma(dots * w_scale[:, :, None], tl.broadcast_to(x_scale[:, None, :], sums.shape), sums)
    store_sums(tl.sum(sums, 0), out, bias, row, column, rows, outputs, IS_WHOLE)


@triton.jit(do_not_specialize=["size"])
def sum_kernel(
    sums,  # [SPLITS, size]
    bias,  # [outputs] or None
    out,  # [size], written: rows of outputs
    size,
    outputs,
    SPLITS: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    wait_for_earlier(IS_EARLY)
    place = tl.program_id(0) * SUM_BLOCK + tl.arange(0, SUM_BLOCK)
    used = place < size
    total = tl.load(sums + place, mask=used, other=0.0)
    for index in tl.static_range(1, SPLITS):  # unrolled: the loads are all in flight at once
        total += tl.load(sums + tl.cast(index, tl.int64) * size + place, mask=used, other=0.0)
    if bias is not None:
        total += tl.load(bias + place % outputs, mask=used, other=0.0)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=used)


# ==== launch ====


def tile_of(dtype: torch.dtype, rows: int) -> dict[str, int]:
    """Rows, outputs and inputs of a tile for a weight's dtype; what a row's sums are made of comes from that alone.

    An int8 tile is bound by the work on the products of its rows, used or not. As those are exact, fewer rows of a
    tile change no bit.
    """
    if dtype == torch.uint8:
        return {"ROWS": 8 if rows <= 8 else 16, "OUTPUTS": 128, "INPUTS": 128}  # many outputs share one rounding of x
    return {"ROWS": 16 if dtype == torch.float32 else 64, "OUTPUTS": 64, "INPUTS": 64}


def split(outputs: int, inputs: int, tile_inputs: int) -> tuple[int, int]:
    """Splits of the inputs, and the tiles of each: a function of the weight's shape, never of the rows."""
    tiles = triton.cdiv(inputs, tile_inputs)
    split_tiles = triton.cdiv(tiles, max(1, min(IN_FLIGHT // outputs, MOST_SPLITS)))
    return triton.cdiv(tiles, split_tiles), split_tiles


def linear(x, weight, bias, outputs, out_dtype):
    """Launches the kernels; arguments and result of torch.ops.pyspec.linear, weight in rows.

    Nothing waits for the device and grids come from shapes alone, so a CUDA graph can capture the call.
    """
    rows, inputs = x.shape
    out = x.new_empty((rows, outputs), dtype=out_dtype)
    bias = None if bias is None else bias.contiguous()
    tile = tile_of(weight.dtype, rows)
    splits, split_tiles = split(outputs, inputs, tile["INPUTS"])
    if weight.dtype == torch.uint8:
        kernel, constants, options, row_bytes = int8_kernel, tile, INT8_OPTIONS, weight.shape[1]
        start = row_bytes - triton.cdiv(inputs, GROUP.value) * GROUP.value  # scales come first
        weights, strides = (weight.view(torch.int8)[:, start:], weight.view(torch.float16)), (row_bytes // 16,)
    else:
        upcast = not x.is_cuda and x.dtype == torch.bfloat16  # the interpreter computes on the bits of bf16
        kernel, constants, options = float_kernel, {**tile, "UPCAST": upcast}, OPTIONS
        weights, strides = (weight,), ()
    early = launch_options(x.device)
    if splits > 1:
        sums = x.new_empty((splits, min(rows, MOST_ROWS), outputs), dtype=torch.float32)
    with torch.cuda.device_of(x):
        for first in range(0, rows, MOST_ROWS):
            some, result = x[first : first + MOST_ROWS], out[first : first + MOST_ROWS]
            numbers = (len(some), outputs, inputs, split_tiles, x.stride(0), *strides)
            ends = (bias, result) if splits == 1 else (None, sums)
            grid = (triton.cdiv(len(some), tile["ROWS"]), triton.cdiv(outputs, tile["OUTPUTS"]), splits)
            kernel[grid](some, *weights, *ends, *numbers, **constants, IS_WHOLE=splits == 1, **options, **early)
            if splits > 1:
                blocks = triton.cdiv(result.numel(), SUM_BLOCK.value)
                sum_kernel[(blocks,)](sums, bias, result, result.numel(), outputs, SPLITS=splits, **OPTIONS, **early)
    return out
