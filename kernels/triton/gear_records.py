"""Records of gear as attention on the GPU reads them: a tile of keys or values unpacked in registers, and low rank."""

import triton
import triton.language as tl

__all__ = ["BLOCK", "PART_OF_X", "load_low_rank", "load_tile"]

BLOCK = tl.constexpr(128)  # tokens of a record
MOST_RANK = tl.constexpr(16)  # the smallest side of a product on tensor cores
PART_OF_X = tl.constexpr(0.25)  # keys and values may be up to 65504, and their differences must be in fp16


# ==== one tile of a record: [H halves of 64 tokens, P pairs of vectors, S blocks of 16 places, 16, 2 vectors] ====


@triton.jit
def pointer(base, offset, dtype: tl.constexpr):
    return (base + offset).to(tl.pointer_type(dtype), bitcast=True)


@triton.jit
def split(words, BITS: tl.constexpr):
    """The two numbers of BITS bits that each of words [..., 1] begins with, int16 [..., 2]."""
    return (words >> (tl.arange(0, 2) * BITS)[None, None, None, None, :]).to(tl.int16)


@triton.jit
def load_codes(words, HALF, PAIRS, SPAN, PLANE: tl.constexpr, H: tl.constexpr, P: tl.constexpr, S: tl.constexpr):
    """PLANE bits of codes, fp16 [H, P, S, 16, 2]; anything beyond PAIRS and SPAN. HALF: words of a half."""
    SHARE: tl.constexpr = 16 // PLANE  # blocks of two vectors in 16 words
    half = tl.arange(0, H)[:, None, None, None, None]
    j = tl.arange(0, 16)[None, None, None, :, None]
    if S == SPAN:  # a word is loaded once
        row = tl.arange(0, P * S // SHARE)[None, :, None, None, None]
        bit = (tl.arange(0, SHARE) * PLANE)[None, None, :, None, None]
        word = tl.load(words + half * HALF + row * 16 + j, mask=row < PAIRS * S // SHARE, other=0)
    else:
        block = tl.arange(0, P)[None, :, None, None, None] * SPAN + tl.arange(0, S)[None, None, :, None, None]
        bit = block % SHARE * PLANE
        there = tl.arange(0, S)[None, None, :, None, None] < SPAN
        word = tl.load(words + half * HALF + block // SHARE * 16 + j, mask=there, other=0)
    # Below the exponent 25 - bit a code at that bit of its byte is worth itself, above 1024 / 2^bit.
    codes = split(word >> (bit // 8 * 8), 16)
    bit = (bit % 8).to(tl.int16)
    base = (25 - bit) << 10
    codes = codes & (((1 << PLANE) - 1) << bit) | base
    codes = codes.to(tl.float16, bitcast=True) - base.to(tl.float16, bitcast=True)
    return tl.reshape(codes, [H, P, S, 16, 2])


@triton.jit
def is_equal(a, b):
    """1.0 where the whole numbers a and b, int16 below 1024, are the same, else 0.0; without a comparison, in fp16."""
    off = (a | 0x6400).to(tl.float16, bitcast=True) - (b | 0x6400).to(tl.float16, bitcast=True)
    off = tl.fma(off, off, tl.full(off.shape, -0.5, tl.float16))
    return tl.abs(off) - off


@triton.jit
def load_tile(side, part, HEAD_DIM, BLOCK_D, TILE, BITS, GROUP, RANK, OUTLIERS: tl.constexpr, VALUES, NUMBER):
    """PART_OF_X of x without low rank, of TILE tokens: keys [BLOCK_D, TILE] or values [TILE, BLOCK_D].

    Of a record's keys or values `side`, its TILE tokens number `part`; all else are constants. Keys are 0 in channels
    that there are not, values are anything.
    """
    VECTORS: tl.constexpr = BLOCK if VALUES else HEAD_DIM
    LENGTH: tl.constexpr = HEAD_DIM if VALUES else BLOCK
    WIDTH: tl.constexpr = GROUP if GROUP < LENGTH else LENGTH
    SCALES: tl.constexpr = LENGTH // WIDTH * VECTORS
    HALF: tl.constexpr = 2 * HEAD_DIM * BITS
    OUTLIER: tl.constexpr = 4 * SCALES + 8 * HALF + RANK * (4 + BLOCK + HEAD_DIM)
    H: tl.constexpr = TILE // 64
    PAIRS: tl.constexpr = 32 if VALUES else HEAD_DIM // 2
    SPAN: tl.constexpr = HEAD_DIM // 16 if VALUES else 4
    P: tl.constexpr = 32 if VALUES else BLOCK_D // 2
    S: tl.constexpr = BLOCK_D // 16 if VALUES else 4

    words = pointer(side, 4 * SCALES, tl.int32) + part * (H * HALF)
    if BITS == 3:
        x = load_codes(words, HALF, PAIRS, SPAN, 2, H, P, S)
        x += 4.0 * load_codes(words + HALF // 3 * 2, HALF, PAIRS, SPAN, 1, H, P, S)
    else:
        x = load_codes(words, HALF, PAIRS, SPAN, BITS, H, P, S)

    half = part * H + tl.arange(0, H)[:, None, None, None, None]
    pair = tl.arange(0, P)[None, :, None, None, None]
    block = tl.arange(0, S)[None, None, :, None, None]
    there = pair < PAIRS
    GROUPS: tl.constexpr = LENGTH // WIDTH if VALUES else (TILE + WIDTH - 1) // WIDTH
    if VALUES:
        pair += half * 32
        group = 0
    else:
        block += half * 4
        group = part * TILE // WIDTH
    scales = pointer(side, 0, tl.int32) + group * (VECTORS // 2) + pair
    zeros = scales + SCALES // 2
    scale = split(tl.load(scales, mask=there, other=0), 16)
    zero = split(tl.load(zeros, mask=there, other=0), 16)
    for g in tl.static_range(1, GROUPS):
        is_later = block >= (group + g) * (WIDTH // 16)
        scale = tl.where(is_later, split(tl.load(scales + g * (VECTORS // 2), mask=there, other=0), 16), scale)
        zero = tl.where(is_later, split(tl.load(zeros + g * (VECTORS // 2), mask=there, other=0), 16), zero)
    scale = scale.to(tl.float16, bitcast=True).to(NUMBER) * PART_OF_X
    zero = zero.to(tl.float16, bitcast=True).to(NUMBER) * PART_OF_X
    x = x.to(NUMBER)
    x = tl.fma(x, tl.broadcast_to(scale, x.shape), tl.broadcast_to(zero, x.shape))

    for o in tl.static_range(OUTLIERS):
        places = pointer(side, OUTLIER + (2 * OUTLIERS + o) * VECTORS, tl.int16) + pair
        place = split(tl.load(places, mask=there, other=0), 8) & 255
        bits = split(tl.load(pointer(side, OUTLIER + 2 * o * VECTORS, tl.int32) + pair, mask=there, other=0), 16)
        value = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)  # bf16 is the upper half of fp32
        outlier = zero.to(tl.float32) + scale.to(tl.float32) * (value + ((1 << BITS) - 1) / 2.0)
        is_block = is_equal(place >> 4, block.to(tl.int16)).to(NUMBER)
        is_place = is_equal(place & 15, tl.arange(0, 16).to(tl.int16)[None, None, None, :, None]).to(NUMBER)
        minus, outlier = tl.broadcast_to(0.0 - is_block, x.shape), is_block * outlier.to(NUMBER)
        change = tl.fma(minus, x, tl.broadcast_to(outlier, x.shape))  # outlier - x in its block, else 0
        x = tl.fma(tl.broadcast_to(is_place, x.shape), change, x)
    if VALUES:
        x = tl.reshape(tl.permute(x, (0, 1, 4, 2, 3)), [TILE, BLOCK_D])
    else:
        x = tl.reshape(tl.permute(x, (1, 4, 0, 2, 3)), [BLOCK_D, TILE])
    return x


@triton.jit
def load_factor(address, N: tl.constexpr, FIRST, COUNT: tl.constexpr, RANK: tl.constexpr, NUMBER: tl.constexpr):
    """int8 [RANK, N] from column FIRST on, as [MOST_RANK, COUNT]; 0 beyond."""
    r, pair = tl.arange(0, MOST_RANK)[:, None, None], FIRST // 2 + tl.arange(0, COUNT // 2)[None, :, None]
    mask = (r < RANK) & (pair < N // 2)
    pairs = tl.load(pointer(address, 0, tl.int16) + r * (N // 2) + pair, mask=mask, other=0)
    bits = pairs >> (tl.arange(0, 2) * 8).to(tl.int16)[None, None, :]
    numbers = (bits & 255 ^ 128 | 0x6400).to(tl.float16, bitcast=True) - 1152.0  # 1024 + 128 + x
    return tl.reshape(numbers, [MOST_RANK, COUNT]).to(NUMBER)


@triton.jit
def load_low_rank(address, part, HEAD_DIM, BLOCK_D: tl.constexpr, TILE: tl.constexpr, RANK: tl.constexpr, NUMBER):
    """PART_OF_X of the factor [MOST_RANK], a [MOST_RANK, TILE] of tokens and b [MOST_RANK, BLOCK_D] of channels."""
    ranks = tl.arange(0, MOST_RANK)
    factor = PART_OF_X * tl.load(pointer(address, 0, tl.float32) + ranks, mask=ranks < RANK, other=0.0)
    a = load_factor(address + 4 * RANK, BLOCK, part * TILE, TILE, RANK, NUMBER)
    return factor, a, load_factor(address + (4 + BLOCK) * RANK, HEAD_DIM, 0, BLOCK_D, RANK, NUMBER)
