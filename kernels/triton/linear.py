"""linear on the GPU: x times a laid out weight transposed, in one order of summation for every number of rows.

One program per (block of rows of x, block of outputs, split of the inputs). Its sums stay in registers; tiles of the
weight and of x are streamed past them through shared memory. Bound by reading the weight; splits put enough programs in
flight for that where there are few outputs, and the last of a block to finish adds them in order, then the bias.
Programs ask for the first of the weight while the small kernels in front of them still run.
Row rule: what a row's sums are made of comes from the weight alone. The weight is the left operand of the tensor cores
and a row of x a column of the right one: it never meets its neighbours, whatever block and place it falls in. The rows
of a tile follow those of a call: they say how many columns an instruction has, not how one of them is added up, and
tiles of 16 and of 64 rows were found to give the same bits on an H200.
fp32: a value is a sum of two of 11 bits, and three of the four products of such sums are added on the tensor cores: the
fourth is below what fp32 rounds off. Tiles are added to each other outside of them, because they cut off, not round.
int8: a group of 32 inputs is an exact integer product times both scales; groups are summed in order. As the product is
exact, the tile may follow the rows. A small kernel in front rounds x, so that programs, which all read it, have only
to multiply. The weight is laid out in the order in which it is read: a program's share is one piece of memory.
"""

import torch

import triton
import triton.language as tl
from pyspec.kernels.early_launch import launch_options, wait_for_earlier
from pyspec.kernels.expert_rows import block_rows

__all__ = [
    "OPTIONS",
    "compile_options",
    "float_kernel",
    "int8_kernel",
    "linear",
    "round_kernel",
    "split",
    "tile_of",
]

GROUP = tl.constexpr(32)  # inputs that share a scale
TILE = tl.constexpr(4)  # groups of an int8 tile
LINES = tl.constexpr(64)  # of 128 bytes, that a program asks for early; asking for more takes longer than it saves
ROUND_GROUPS = 16  # of a program of round_kernel
SUM_SPLITS = tl.constexpr(8)  # that are added with all loads in flight
# 1.5 * 2^23: a float of this size has the integers as its low bits. Added to a small float, it leaves the nearest
# integer there. Where a product of integers starts from its bits, the result is that product as a float, shifted, which
# one multiply-add scales and shifts back, rounding once: half of what a conversion and a multiplication cost.
SHIFT = tl.constexpr(12582912.0)
SHIFT_BITS = tl.constexpr(0x4B400000)
IN_FLIGHT = 32768  # outputs of all programs together: four programs on each multiprocessor of a large GPU
MOST_SPLITS = 32
MOST_ROWS = 512  # of a launch, which bounds the memory of the splits' sums
TICKETS = MOST_ROWS // 16 * IN_FLIGHT // 64  # more blocks of rows and outputs than a launch with splits has
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def prefetch(places, IS_EARLY: tl.constexpr):
    """Has what pointers point to brought into the L2 cache, while others finish."""
    if IS_EARLY:
        asm: tl.constexpr = "prefetch.global.L2 [$1]; mov.b32 $0, 0;"
        tl.inline_asm_elementwise(asm, "=r,l", [places.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def store_sums(
    sums,  # [OUTPUTS, ROWS] of a program
    row,
    column,
    bias,  # [outputs] or None
    out,  # [rows, outputs], written
    parts,  # [splits, rows, outputs]
    tickets,  # both as parts_of makes them
    rows,
    outputs,
    IS_WHOLE: tl.constexpr,
):
    mask = (column < outputs)[:, None] & (row < rows)[None, :]
    offsets = row.to(tl.int64)[None, :] * outputs + column[:, None]
    if IS_WHOLE:
        if bias is not None:
            sums += tl.load(bias + column, mask=column < outputs, other=0.0)[:, None]
        tl.store(out + offsets, sums.to(out.dtype.element_ty), mask=mask)
    else:
        tl.store(parts + tl.program_id(2).to(tl.int64) * rows * outputs + offsets, sums, mask=mask)
        # The barrier puts the stores of all threads before the one that takes the ticket. That releases them to the
        # GPU and acquires what programs with earlier tickets released; nobody reads before it has the ticket's number.
        tl.debug_barrier()
        ticket = tickets + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        if tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == tl.num_programs(2) - 1:
            tl.store(ticket, 0)
            add_splits(bias, out, parts, column, rows, outputs, row.shape[0])


@triton.jit
def add_splits(bias, out, parts, column, rows, outputs, ROWS: tl.constexpr):
    """A block of ROWS rows and some outputs, a few rows at a time; arguments as for store_sums."""
    SOME: tl.constexpr = ROWS // 4 if ROWS > 32 else 8  # whose loads fit into registers
    splits = tl.num_programs(2)
    stride = tl.cast(rows, tl.int64) * outputs
    first = tl.program_id(0) * ROWS
    for start in range(first, tl.minimum(first + ROWS, rows), SOME):
        row = start + tl.arange(0, SOME)
        place = row.to(tl.int64)[:, None] * outputs + column[None, :]
        mask = (row < rows)[:, None] & (column < outputs)[None, :]
        total = tl.zeros(mask.shape, tl.float32)
        part = parts + place
        for some in range(0, splits, SUM_SPLITS):
            for index in tl.static_range(SUM_SPLITS):
                here = mask & (row < tl.where(splits > some + index, rows, 0))[:, None]
                total += tl.load(part, mask=here, other=0.0, cache_modifier=".cg")  # others wrote it: not from L1
                part += stride
        if bias is not None:
            total += tl.load(bias + column, mask=column < outputs, other=0.0)[None, :]
        tl.store(out + place, total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "split_tiles"])
def float_kernel(
    x,  # [rows, inputs]
    weight,  # [outputs, inputs]
    bias,  # [outputs] or None
    out,  # [rows, outputs], written
    parts,  # both as parts_of makes them
    tickets,
    rows,
    outputs,
    inputs,
    split_tiles,
    stride_x,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    STAGES: tl.constexpr,  # tiles in flight or in use
    IS_WHOLE: tl.constexpr,
    UPCAST: tl.constexpr,
    IS_EARLY: tl.constexpr,
    order=None,  # of expert_linear, as the next two: see expert_rows.py
    experts=None,
    choices=None,
):
    tiles = tl.cdiv(inputs, INPUTS)
    row, x_row, expert, tiles = block_rows(order, experts, choices, rows, tiles, ROWS, IS_EARLY)
    if order is not None:
        weight += expert * outputs * inputs
        if bias is not None:
            bias += expert * outputs
    column = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    within = tl.arange(0, INPUTS)
    x_rows = x + x_row.to(tl.int64)[:, None] * stride_x
    weight_rows = weight + column.to(tl.int64)[:, None] * inputs
    row_used, column_used = (row < rows)[:, None], (column < outputs)[:, None]
    first_tile = tl.program_id(2) * split_tiles
    end_tile = tl.minimum(first_tile + split_tiles, tiles)
    lines = first_tile * INPUTS + tl.arange(0, LINES // OUTPUTS) * (1024 // weight.dtype.element_ty.primitive_bitwidth)
    first_rows = weight + tl.minimum(column, outputs - 1).to(tl.int64)[:, None] * inputs
    prefetch(first_rows + tl.minimum(lines, inputs - 1)[None, :], IS_EARLY)
    wait_for_earlier(IS_EARLY)
    sums = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for tile in tl.range(first_tile, end_tile, num_stages=STAGES):
        k = tile * INPUTS + within
        k_used = (k < inputs)[None, :]
        w = tl.load(weight_rows + k[None, :], mask=column_used & k_used, other=0.0)
        values = tl.load(x_rows + k[None, :], mask=row_used & k_used, other=0.0)
        if UPCAST:
            w, values = w.to(tl.float32), values.to(tl.float32)
        if w.dtype == tl.float32:
            sums += tl.dot(w, tl.trans(values), input_precision="tf32x3")
        else:
            sums = tl.dot(w, tl.trans(values), sums)
    store_sums(sums, row, column, bias, out, parts, tickets, rows, outputs, IS_WHOLE)


@triton.jit(do_not_specialize=["padded"])
def round_kernel(
    x,  # [rows, inputs]
    integers,  # int8 [groups, padded, GROUP], written: x rounded, beside what a program of int8_kernel reads with it
    scales,  # fp32 [groups, padded], written; of a group that is not finite NaN
    padded,
    inputs,
    groups,
    stride_x,
    GROUPS: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    row = tl.program_id(0)
    group, within = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS), tl.arange(0, GROUP)
    k = group[:, None] * GROUP + within[None, :]
    wait_for_earlier(IS_EARLY)
    values = tl.load(x + row.to(tl.int64) * stride_x + k, mask=k < inputs, other=0.0).to(tl.float32)
    # As bits the sizes keep their order and NaN is the largest, which a maximum of floats would drop.
    bits = tl.max(tl.abs(values).to(tl.int32, bitcast=True), 1)
    largest = bits.to(tl.float32, bitcast=True)
    factor = tl.math.div_rn(127.0, tl.maximum(largest, 4e-37))  # which keeps it finite
    rounded = (values * factor[:, None] + SHIFT).to(tl.int32, bitcast=True).to(tl.int8)
    scale = tl.where(largest < float("inf"), tl.math.div_rn(largest, 127.0), float("nan"))
    place, used = group * padded + row, group < groups
    tl.store(integers + place[:, None] * GROUP + within[None, :], rounded, mask=used[:, None])
    tl.store(scales + place, scale, mask=used)


@triton.jit(do_not_specialize=["rows", "split_tiles", "x_rows"])
def int8_kernel(
    x,  # int8 [groups, rows filled up to ROWS, GROUP]: what lies in the rows that fill up is not stored
    x_scales,  # fp32 [groups, rows filled up]
    weight,  # int8 [panels, tiles, TILE_BYTES]: of a tile scales, fp16 [OUTPUTS, TILE], then [TILE, OUTPUTS, GROUP]
    scales,  # the same as int64: the scales of an output in a tile are one
    bias,  # [outputs] or None
    out,  # [rows, outputs], written
    parts,  # both as parts_of makes them
    tickets,
    rows,
    outputs,
    tiles,
    split_tiles,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STAGES: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    IS_EARLY: tl.constexpr,
    order=None,  # of expert_linear, as the next three: see expert_rows.py
    experts=None,
    choices=None,
    x_rows=None,  # rows of x, which are not filled up
):
    BYTES: tl.constexpr = TILE * OUTPUTS * (GROUP + 2)
    row, x_row, expert, own_tiles = block_rows(order, experts, choices, rows, tiles, ROWS, IS_EARLY)
    within, output = tl.arange(0, GROUP)[None, :], tl.arange(0, OUTPUTS)
    padded = tl.num_programs(0) * ROWS
    first_tile = tl.program_id(2) * split_tiles
    end_tile = tl.minimum(first_tile + split_tiles, own_tiles)
    panel = tl.program_id(1).to(tl.int64) * tiles
    if order is not None:
        padded = x_rows
        panel += expert * tl.num_programs(1) * tiles
        if bias is not None:
            bias += expert * outputs
    first = weight + (panel + first_tile) * BYTES
    prefetch(first + tl.minimum(tl.arange(0, LINES) * 128, (end_tile - first_tile) * BYTES - 1), IS_EARLY)
    wait_for_earlier(IS_EARLY)
    sums = tl.zeros([OUTPUTS, ROWS], tl.float32)
    start = tl.full([OUTPUTS, ROWS], SHIFT_BITS, tl.int32)
    for tile in tl.range(first_tile, end_tile, num_stages=STAGES):
        four_scales = tl.load(scales + (panel + tile) * (BYTES // 8) + output)
        integers = weight + (panel + tile) * BYTES + TILE * OUTPUTS * 2
        for index in tl.static_range(TILE):
            place = (tile * TILE + index) * padded + x_row
            w = tl.load(integers + (index * OUTPUTS + output[:, None]) * GROUP + within)
            values = tl.load(x + place[:, None] * GROUP + within)
            x_scale = tl.load(x_scales + place)
            scale = (four_scales >> index * 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            shifted = tl.dot(w, tl.trans(values), start, out_dtype=tl.int32).to(tl.float32, bitcast=True)
            products = tl.fma(
                shifted,
                tl.broadcast_to(scale[:, None], sums.shape),
                tl.broadcast_to(scale[:, None] * -SHIFT, sums.shape),
            )
            sums = tl.fma(products, tl.broadcast_to(x_scale[None, :], sums.shape), sums)
    column = tl.program_id(1) * OUTPUTS + output
    store_sums(sums, row, column, bias, out, parts, tickets, rows, outputs, IS_WHOLE)


# ==== launch ====


def tile_of(dtype: torch.dtype, rows: int) -> dict[str, int]:
    """Of a tile for a weight's dtype rows, outputs, inputs, and how many there are at a time.

    As many as let four programs onto a multiprocessor, no more, or they would not spread evenly. What a row's sums are
    made of comes from the dtype alone: the rows of a tile only say how many columns an instruction has.
    """
    if dtype == torch.float32:
        return {"ROWS": 32, "OUTPUTS": 64, "INPUTS": 32, "STAGES": 3}
    inputs = TILE.value * GROUP.value if dtype == torch.uint8 else 64
    height, stages = (16, 5) if rows <= 16 else (32, 4) if rows <= 32 else (64, 3)
    return {"ROWS": height, "OUTPUTS": 64, "INPUTS": inputs, "STAGES": stages}


def compile_options(dtype: torch.dtype, tile_rows: int) -> dict:
    """For int8, programs of 64 rows have 128 registers a thread, and those of fewer rows 80.

    Left alone, Triton 3.6 takes more for the one and fewer for the other, by computing places again in every round.
    """
    if dtype in (torch.float16, torch.bfloat16):
        return {**OPTIONS, "num_warps": 8 if tile_rows == 64 else 4}
    return {**OPTIONS, "maxnreg": None if dtype != torch.uint8 else 128 if tile_rows == 64 else 80}


def split(outputs: int, inputs: int, tile_inputs: int) -> tuple[int, int]:
    """Splits of the inputs, and the tiles of each: a function of the weight's shape, never of the rows."""
    tiles = triton.cdiv(inputs, tile_inputs)
    split_tiles = triton.cdiv(tiles, max(1, min(IN_FLIGHT // outputs, MOST_SPLITS)))
    return triton.cdiv(tiles, split_tiles), split_tiles


_tickets = {}  # by device


def parts_of(x, splits, outputs):
    """What programs leave for the last of a block, parts and tickets: None each where there is one split.

    parts: fp32, the sums of each split. tickets: int32, how many splits of a block of rows and outputs are stored. A
    device has them once, all 0 between calls, as the last program leaves them so: no launch clears them. So two calls
    must not run at the same time. They follow each other on a stream, and a program that is there early waits for the
    end of the call in front. A graph is captured behind a call, so it does not make them.
    """
    if splits == 1:
        return None, None
    if x.device not in _tickets:
        _tickets[x.device] = x.new_zeros(TICKETS, dtype=torch.int32)
    return x.new_empty((splits, min(len(x), MOST_ROWS), outputs), dtype=torch.float32), _tickets[x.device]


def linear(x, weight, bias, outputs, out_dtype):
    """Launches the kernels; arguments and result of torch.ops.pyspec.linear.

    Nothing waits for the device and grids come from shapes alone, so a CUDA graph can capture the call.
    """
    rows, inputs = x.shape
    out = x.new_empty((rows, outputs), dtype=out_dtype)
    bias = None if bias is None else bias.contiguous()
    tile = tile_of(weight.dtype, rows)
    splits, split_tiles = split(outputs, inputs, tile["INPUTS"])
    early = launch_options(x.device)
    parts = parts_of(x, splits, outputs)
    with torch.cuda.device_of(x):
        for first in range(0, rows, MOST_ROWS):
            some, result = x[first : first + MOST_ROWS], out[first : first + MOST_ROWS]
            ends = bias, result, *parts
            blocks = triton.cdiv(len(some), tile["ROWS"])
            grid = (blocks, triton.cdiv(outputs, tile["OUTPUTS"]), splits)
            how = {"IS_WHOLE": splits == 1, **early, **compile_options(weight.dtype, tile["ROWS"])}
            if weight.dtype == torch.uint8:
                rounded = round_rows(some, blocks * tile["ROWS"], weight.shape[1], early)
                weights = weight.view(torch.int8), weight.view(torch.int64)
                sizes = {name: tile[name] for name in ("ROWS", "OUTPUTS", "STAGES")}
                numbers = len(some), outputs, weight.shape[1], split_tiles
                int8_kernel[grid](*rounded, *weights, *ends, *numbers, **sizes, **how)
            else:
                upcast = not x.is_cuda and x.dtype == torch.bfloat16  # the interpreter computes on the bits of bf16
                numbers = len(some), outputs, inputs, split_tiles, x.stride(0)
                float_kernel[grid](some, weight, *ends, *numbers, **tile, **how, UPCAST=upcast)
    return out


def round_rows(x, padded, tiles, early):
    """int8 [groups, padded, GROUP] and scales [groups, padded] of x [rows, inputs]; rows that fill up are as found."""
    groups = tiles * TILE.value
    integers = x.new_empty((groups, padded, GROUP.value), dtype=torch.int8)
    scales = x.new_empty((groups, padded), dtype=torch.float32)
    numbers = padded, x.shape[1], groups, x.stride(0)
    grid = (len(x), triton.cdiv(groups, ROUND_GROUPS))
    round_kernel[grid](x, integers, scales, *numbers, GROUPS=ROUND_GROUPS, **early, **OPTIONS)
    return integers, scales
