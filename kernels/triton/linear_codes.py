"""linear on the GPU for weights in 2 to 6 bits: codes become levels in registers, on their way to the tensor cores.

    out[r, n] = sum over groups g of factor scale[n, g] sum over k in g of level[n, k] x[r, k]
                                     - floor minimum[n, g] sum over k in g of x[r, k]

As in linear.py one program per (block of rows of x, panel of outputs, split of the inputs) keeps its sums in registers,
tiles are streamed past them through shared memory, and the weight is laid out in the order in which it is read. Levels
are small integers, exact in bf16 and fp16, and x stays as it is: a group's dot is summed by the tensor cores in fp32,
scales and factors are multiplied in fp32, and one multiply-add for each group, in ascending order, adds it to the sums.
Minimums are small integers too: with each standing in the place of all codes of its group they are one more weight,
whose dot over all groups that share a floor is subtracted at once.
Bound by reading 4.5 bits a weight, behind which the unpacking has to hide: about three instructions a weight. A word of
16 bits has the codes of four groups, so that a register, two words, is turned into four operands of tensor cores by
shifts and masks alone; nothing is moved between threads. Where codes have 5 or 6 bits, those above the fourth are a
byte beside each word. Groups have 32 inputs, or 16 where a format has a scale for each 16: then one step of the tensor
cores is a group.
Row rule: tiles and splits come from the weight alone. How many rows are multiplied at once does not: an element of a
product on the tensor cores is made of its own row and column, in one order, whatever is beside them.
"""

import functools

import torch

import triton
import triton.language as tl
from pyspec.kernels import linear
from pyspec.kernels.early_launch import launch_options, wait_for_earlier
from pyspec.kernels.expert_rows import block_rows
from pyspec.kernels.linear import MOST_ROWS, OPTIONS, prefetch
from pyspec.ops.linear_codes_tiles import GROUPS, OUTPUTS, group_inputs, has_zero_points, tile_bytes, tile_inputs
from pyspec.ops.weight_formats import WeightFormat

__all__ = ["codes_kernel", "compile_options", "constants_of", "linear_codes", "linear_joined", "split", "tile_rows"]

PLANES = tl.constexpr(GROUPS)  # codes of a word
LINES = tl.constexpr(64)  # of 128 bytes, that a program asks for early; 256 took a tenth longer
SUM_BLOCK = tl.constexpr(256)
IN_FLIGHT = 32768  # outputs of all programs together; twice as many took a tenth longer
MOST_SPLITS = 32
# A float of 2^23 has the integers as its low bits: a byte that is put there becomes a float by a subtraction. Scales
# have 128 more. Likewise codes and minimums become numbers in 128 of bf16 and in 1024 of fp16.
SHIFT_BITS = tl.constexpr(0x4B000000)
SCALE_SHIFT = tl.constexpr(8388608.0 + 128)


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
    """Adds the splits in order: the last program of a block, as in linear.py, took longer for as short programs."""
    wait_for_earlier(IS_EARLY)
    place = tl.program_id(0) * SUM_BLOCK + tl.arange(0, SUM_BLOCK)
    used = place < size
    total = tl.load(sums + place, mask=used, other=0.0)
    for index in tl.static_range(1, SPLITS):  # unrolled: the loads are all in flight at once
        total += tl.load(sums + tl.cast(index, tl.int64) * size + place, mask=used, other=0.0)
    if bias is not None:
        total += tl.load(bias + place % outputs, mask=used, other=0.0)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=used)


@triton.jit
def load_at(weight, place, within, TYPE: tl.constexpr):
    """Elements of a type out of a weight of bytes: those at `within` from the byte `place`."""
    return tl.load((weight + place).to(tl.pointer_type(TYPE)) + within)


@triton.jit
def half(words, INDEX: tl.constexpr, TYPE: tl.constexpr):
    """Of each word the 16 bits with an index, as a floating-point number in fp32."""
    return (words >> (16 * INDEX)).to(tl.int16).to(TYPE, bitcast=True).to(tl.float32)


@triton.jit
def byte(words, INDEX: tl.constexpr):
    return (words >> (8 * INDEX)) & 255


@triton.jit
def less_of(minimums, words, INDEX: tl.constexpr, LESS: tl.constexpr, HAS_ZEROS: tl.constexpr):
    """What is added to a code's bits in its base to make it a level, as bits: of one group, by output."""
    less = (byte(minimums, INDEX) | LESS) if HAS_ZEROS else tl.full(minimums.shape, LESS, tl.int32)
    return tl.broadcast_to(less.to(tl.int16)[:, None], words.shape)


@triton.jit
def unpack(words, highs, minimums, x, LESS: tl.constexpr, HAS_ZEROS: tl.constexpr, UNPACK: tl.constexpr):
    """The levels of four groups out of words: of x's type, or bf16 where that is fp32."""
    kind = tl.bfloat16 if x.dtype.element_ty == tl.float32 else x.dtype.element_ty
    less = (
        less_of(minimums, words, 0, LESS, HAS_ZEROS),
        less_of(minimums, words, 1, LESS, HAS_ZEROS),
        less_of(minimums, words, 2, LESS, HAS_ZEROS),
        less_of(minimums, words, 3, LESS, HAS_ZEROS),
    )
    arguments = [words, less[0], less[1], less[2], less[3]]
    constraints: tl.constexpr = "=r,=r,=r,=r,r,r,r,r,r" if highs is None else "=r,=r,=r,=r,r,r,r,r,r,r"
    if highs is not None:
        arguments = [words, less[0], less[1], less[2], less[3], highs.to(tl.int16)]
    return tl.inline_asm_elementwise(UNPACK, constraints, arguments, (kind, kind, kind, kind), is_pure=True, pack=2)


@triton.jit
def spread_minimums(minimums, words, x, SPREAD: tl.constexpr):
    """The minimums of four groups, each in the place of all levels."""
    kind = tl.bfloat16 if x.dtype.element_ty == tl.float32 else x.dtype.element_ty
    many = tl.broadcast_to(minimums[:, None], words.shape)
    constraints: tl.constexpr = "=r,=r,=r,=r,r,r"
    return tl.inline_asm_elementwise(SPREAD, constraints, [many], (kind, kind, kind, kind), is_pure=True, pack=2)


@triton.jit
def table_levels(words, highs, minimums, INDEX: tl.constexpr, LEVELS: tl.constexpr, HAS_ZEROS: tl.constexpr):
    """Levels of the codes of one group, looked up: the interpreter's way. Those of more than 16 ascend."""
    levels = tl.zeros(words.shape, tl.float32)
    for code in tl.static_range(16):
        levels = tl.where((words >> (4 * INDEX)) & 15 == code, float(LEVELS[code]), levels)
    if highs is not None:
        levels += ((highs >> (2 * INDEX)) & 3).to(tl.float32) * 16
    if HAS_ZEROS:
        levels -= byte(minimums, INDEX).to(tl.float32)[:, None]
    return levels


@triton.jit
def dot(w, values, sums):
    """w [OUTPUTS, inputs of a group] times values [ROWS, inputs] transposed, plus sums."""
    if w.dtype == tl.float32:
        return tl.dot(w, tl.trans(values), sums, input_precision="tf32x3")
    return tl.dot(w, tl.trans(values), sums)


@triton.jit(do_not_specialize=["rows", "split_tiles"])
def codes_kernel(
    x,  # [rows, inputs]
    weight,  # uint8 [panels, tiles, TILE_BYTES], see pyspec/ops/linear_codes_tiles.py
    bias,  # [outputs] or None
    out,  # [rows, outputs], or sums of splits [splits, rows, outputs], written
    rows,
    outputs,
    inputs,
    tiles,
    split_tiles,
    stride_x,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TILE_BYTES: tl.constexpr,
    WIDTH: tl.constexpr,  # inputs of a group
    BLOCK: tl.constexpr,  # inputs that share a factor, at most those of a tile
    FACTOR: tl.constexpr,  # the factors' type
    HAS_SCALES: tl.constexpr,
    HAS_FLOORS: tl.constexpr,
    HAS_MINIMUMS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,  # minimums are taken off the levels
    HAS_HIGHS: tl.constexpr,  # codes have more than 4 bits
    LESS: tl.constexpr,  # see less_of
    LEVELS: tl.constexpr,
    UNPACK: tl.constexpr,  # PTX; for the interpreter None
    SPREAD: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    IS_EARLY: tl.constexpr,
    order=None,  # of expert_linear, as the next two: see expert_rows.py
    experts=None,
    choices=None,
):
    INPUTS: tl.constexpr = PLANES * WIDTH
    # A tile's factors of one output are one number, of 64 bits where every group has its own.
    FACTORS: tl.constexpr = tl.int64 if BLOCK == 32 else tl.int32
    FACTORS_BYTES: tl.constexpr = OUTPUTS * (8 if BLOCK == 32 else 4)
    FLOORS: tl.constexpr = FACTORS_BYTES if HAS_FLOORS and BLOCK < INPUTS else 0  # else beside the factor
    SCALES: tl.constexpr = FLOORS + FACTORS_BYTES
    MINIMUMS: tl.constexpr = SCALES + (4 * OUTPUTS if HAS_SCALES else 0)
    CODES: tl.constexpr = MINIMUMS + (4 * OUTPUTS if HAS_MINIMUMS else 0)
    HIGHS: tl.constexpr = CODES + 2 * OUTPUTS * WIDTH
    row, x_row, expert, own_tiles = block_rows(order, experts, choices, rows, tiles, ROWS, IS_EARLY)
    within, output = tl.arange(0, WIDTH)[None, :], tl.arange(0, OUTPUTS)
    x_rows, row_used = x + x_row.to(tl.int64)[:, None] * stride_x, (row < rows)[:, None]
    first_tile = tl.program_id(2) * split_tiles
    end_tile = tl.minimum(first_tile + split_tiles, own_tiles)
    panel = tl.program_id(1).to(tl.int64) * tiles
    if order is not None:
        panel += expert * tl.num_programs(1) * tiles
        bias = bias if bias is None else bias + expert * outputs
    first = weight + (panel + first_tile) * TILE_BYTES
    prefetch(first + tl.minimum(tl.arange(0, LINES) * 128, (end_tile - first_tile) * TILE_BYTES - 1), IS_EARLY)
    wait_for_earlier(IS_EARLY)
    sums = tl.zeros([OUTPUTS, ROWS], tl.float32)
    nothing = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for tile in tl.range(first_tile, end_tile, num_stages=4 if ROWS <= 16 else 3):
        place = (panel + tile) * TILE_BYTES
        factors = load_at(weight, place, output, FACTORS)
        floors = load_at(weight, place + FLOORS, output, FACTORS) if FLOORS > 0 else factors
        scales = load_at(weight, place + SCALES, output, tl.int32) if HAS_SCALES else factors
        minimums = load_at(weight, place + MINIMUMS, output, tl.int32) if HAS_MINIMUMS else factors
        words = load_at(weight, place + CODES, output[:, None] * WIDTH + within, tl.int16)
        highs = load_at(weight, place + HIGHS, output[:, None] * WIDTH + within, tl.int8) if HAS_HIGHS else None
        if UNPACK is not None:
            planes = unpack(words, highs, minimums, x, LESS, HAS_ZEROS, UNPACK)
            if HAS_FLOORS and HAS_MINIMUMS:
                spread = spread_minimums(minimums, words, x, SPREAD)
        below = nothing
        for index in tl.static_range(PLANES):
            k = tile * INPUTS + index * WIDTH + within
            values = tl.load(x_rows + k, mask=row_used & (k < inputs), other=0.0)
            if UNPACK is not None:
                w = planes[index].to(values.dtype)
            else:
                w, values = table_levels(words, highs, minimums, index, LEVELS, HAS_ZEROS), values.to(tl.float32)
            scale = half(factors, index * WIDTH // BLOCK, FACTOR)
            if HAS_SCALES:
                scale *= (byte(scales, index) | SHIFT_BITS).to(tl.float32, bitcast=True) - SCALE_SHIFT
            sums = tl.fma(dot(w, values, nothing), tl.broadcast_to(scale[:, None], sums.shape), sums)
            if HAS_FLOORS:
                if not HAS_MINIMUMS:
                    minimum = tl.full(w.shape, 1.0, w.dtype)
                elif UNPACK is not None:
                    minimum = spread[index].to(w.dtype)
                else:
                    minimum = tl.broadcast_to(byte(minimums, index).to(tl.float32)[:, None], w.shape)
                below = dot(minimum, values, below)
                if (index + 1) * WIDTH % BLOCK == 0:
                    floor = half(floors, 1 if FLOORS == 0 else index * WIDTH // BLOCK, FACTOR)
                    sums = tl.fma(below, tl.broadcast_to(-floor[:, None], sums.shape), sums)
                    below = nothing
    store_sums(sums, out, bias, row, tl.program_id(1) * OUTPUTS + output, rows, outputs, IS_WHOLE)


# ==== launch ====


def numbers_of(dtype: torch.dtype) -> tuple[int, str]:
    """The number whose last bits are integers, below 128 at least, and PTX's name for pairs, in the levels' dtype."""
    return (1024, "f16x2") if dtype == torch.float16 else (128, "bf16x2")


def bits(number: int, dtype: torch.dtype) -> int:
    """A pair of equal numbers as bits."""
    one = torch.tensor(number, dtype=torch.float16 if dtype == torch.float16 else torch.bfloat16)
    return (one.view(torch.int16).item() & 0xFFFF) * 0x10001


def unpack_asm(levels: tuple[int, ...], dtype: torch.dtype) -> str:
    """PTX for the levels of the four codes in each of two words $4: of their first codes $0, of the second $1...

    Codes of more than 16 levels have higher bits in two words $9.
    """
    if levels != tuple(range(levels[0], levels[0] + len(levels))):
        return look_up_asm(levels, dtype)
    base, kind = numbers_of(dtype)
    lines = [".reg .b32 code, high, one;", f"mov.b32 one, {bits(1, dtype):#x};"]
    for plane in range(4):
        lines += [f"shr.u32 code, $4, {4 * plane};"]
        lines += [f"lop3.b32 code, code, 0x000f000f, {bits(base, dtype):#x}, 0xea;"]  # and, or
        if len(levels) > 16:
            lines += [f"shl.b32 high, $9, {4 - 2 * plane};" if plane < 2 else f"shr.u32 high, $9, {2 * plane - 4};"]
            lines += ["lop3.b32 code, high, 0x00300030, code, 0xea;"]
        lines += [f"fma.rn.{kind} ${plane}, code, one, ${5 + plane};"]
    return "{ " + " ".join(lines) + " }"


def look_up_asm(levels: tuple[int, ...], dtype: torch.dtype) -> str:
    """The same out of a table: prmt picks 4 of 8 bytes by the codes' last 3 bits, and of two such by the first."""
    tables = [[bits(level, dtype) >> shift & 255 for level in levels] for shift in (0, 8)]
    tables = [[sum(table[4 * i + j] << 8 * j for j in range(4)) for i in range(4)] for table in tables]
    lines = [".reg .b32 below, is_high, a, b, low0, high0, low1, high1, first, second;"]
    lines += ["and.b32 below, $4, 0x77777777;", "shr.u32 is_high, $4, 1;"]
    lines += ["lop3.b32 is_high, is_high, 0x44444444, 0x32103210, 0xea;"]
    for word in range(2):
        if word:
            lines += ["shr.u32 below, below, 16;", "shr.u32 is_high, is_high, 16;"]
        for name, table in zip(("low", "high"), tables, strict=True):
            lines += [f"mov.b32 a, {table[1]:#x};", f"mov.b32 b, {table[3]:#x};"]
            lines += [f"prmt.b32 a, {table[0]:#x}, a, below;", f"prmt.b32 b, {table[2]:#x}, b, below;"]
            lines += [f"prmt.b32 {name}{word}, a, b, is_high;"]
    for pair, bytes_ in enumerate(("0x5140", "0x7362")):  # of planes: low and high bytes side by side
        lines += [f"prmt.b32 first, low0, high0, {bytes_};", f"prmt.b32 second, low1, high1, {bytes_};"]
        lines += [f"prmt.b32 ${2 * pair}, first, second, 0x5410;", f"prmt.b32 ${2 * pair + 1}, first, second, 0x7632;"]
    return "{ " + " ".join(lines) + " }"


def spread_asm(dtype: torch.dtype) -> str:
    """PTX for pairs of equal numbers $0 to $3 out of the four bytes of $4, each below 128."""
    base, kind = numbers_of(dtype)
    lines = [".reg .b32 number, one, less;", f"mov.b32 one, {bits(1, dtype):#x};"]
    lines += [f"mov.b32 less, {bits(-base, dtype):#x};"]
    for byte in range(4):
        lines += [f"prmt.b32 number, $4, {bits(base, dtype) >> 24:#x}, {0x4040 + 0x0101 * byte:#x};"]
        lines += [f"fma.rn.{kind} ${byte}, number, one, less;"]
    return "{ " + " ".join(lines) + " }"


@functools.cache
def constants_of(format: WeightFormat, dtype: torch.dtype, is_cuda: bool) -> dict:
    """What the kernel is compiled for, of a weight's format and x's dtype."""
    has_zeros = has_zero_points(format)
    return {
        "OUTPUTS": OUTPUTS,
        "TILE_BYTES": tile_bytes(format),
        "WIDTH": group_inputs(format),
        "BLOCK": min(format.block, tile_inputs(format)),
        "FACTOR": tl.bfloat16 if format.factor_dtype == torch.bfloat16 else tl.float16,
        "HAS_SCALES": format.has_scales,
        "HAS_FLOORS": format.has_floors and not has_zeros,
        "HAS_MINIMUMS": format.has_minimums,
        "HAS_ZEROS": has_zeros,
        "HAS_HIGHS": format.bits > 4,
        "LESS": bits(format.levels[0] - numbers_of(dtype)[0], dtype) & 0xFFFF,
        "LEVELS": None if is_cuda else (format.levels + 12 * (0,))[:16],
        "UNPACK": unpack_asm(format.levels, dtype) if is_cuda else None,
        "SPREAD": spread_asm(dtype) if is_cuda else None,
    }


def tile_rows(rows: int, dtype: torch.dtype, architecture: int) -> int:
    """Rows of a tile, for x's dtype and a GPU's architecture, as 90.

    More rows unpack a code once for all of them, fewer take fewer multiply-adds. They follow the rows where the
    tensor cores compute a row's sums alike for all of these: before Hopper by the same instruction, and on Hopper by
    one that is as wide as the tile, where that was measured.
    """
    if dtype == torch.float32:
        return 16
    if architecture >= 100:
        return 32
    return 8 if rows <= 8 else 16 if rows <= 16 else 32 if rows <= 32 else 64


def compile_options(rows: int) -> dict:
    """For tiles of so many rows; two programs of 64 rows have 128 registers a thread."""
    return {**OPTIONS, "num_warps": 8, "maxnreg": 128} if rows == 64 else {**OPTIONS, "maxnreg": None}


def split(outputs: int, tiles: int) -> tuple[int, int]:
    """Splits of the inputs, and the tiles of each: a function of the weight's shape, never of the rows."""
    split_tiles = triton.cdiv(tiles, max(1, min(IN_FLIGHT // outputs, MOST_SPLITS)))
    return triton.cdiv(tiles, split_tiles), split_tiles


def linear_codes(x, weight, bias, outputs, format, out_dtype):
    """Launches the kernels for a weight that lay_out_tiles laid out; the rest is as in linear."""
    rows, inputs = x.shape
    out = x.new_empty((rows, outputs), dtype=out_dtype)
    bias = None if bias is None else bias.contiguous()
    panels, tiles = weight.shape[:2]
    splits, split_tiles = split(outputs, tiles)
    early = launch_options(x.device)
    architecture = 10 * torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 90
    constants = constants_of(format, x.dtype, x.is_cuda)
    if splits > 1:
        sums = x.new_empty((splits, min(rows, MOST_ROWS), outputs), dtype=torch.float32)
    with torch.cuda.device_of(x):
        for first in range(0, rows, MOST_ROWS):
            some, result = x[first : first + MOST_ROWS], out[first : first + MOST_ROWS]
            ends = (bias, result) if splits == 1 else (None, sums)
            height = tile_rows(len(some), x.dtype, architecture)
            numbers = len(some), outputs, inputs, tiles, split_tiles, x.stride(0)
            how = {"ROWS": height, "IS_WHOLE": splits == 1, **constants, **early, **compile_options(height)}
            codes_kernel[(triton.cdiv(len(some), height), panels, splits)](some, weight, *ends, *numbers, **how)
            if splits > 1:
                blocks = triton.cdiv(result.numel(), SUM_BLOCK.value)
                sum_kernel[(blocks,)](sums, bias, result, result.numel(), outputs, SPLITS=splits, **OPTIONS, **early)
    return out


def linear_joined(x, weights, bias, outputs, formats, out_dtype):
    """linear_codes of weights one below another, or linear where one has 8 bits: columns of one result."""
    biases = [None] * len(weights) if bias is None else bias.split(list(outputs))
    parts = []
    for weight, own, count, format in zip(weights, biases, outputs, formats, strict=True):
        if format.bits == 8:
            parts.append(linear.linear(x, weight, own, count, out_dtype))
        else:
            parts.append(linear_codes(x, weight, own, count, format, out_dtype))
    return torch.cat(parts, 1)
