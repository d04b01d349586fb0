"""The Triton kernel of linear for weights in 2 to 6 bits: an oracle in float64, the row rule, and its PTX."""

import re

import pytest
import torch

from pyspec.ops import linear_codes_tiles as layout
from pyspec.ops.weight_formats import FORMATS, Codes
from tests.helpers.on_gpu import assert_close, to_device

pytest.importorskip("triton", reason="Triton is not installed for this platform")
from pyspec.kernels import linear_codes as kernels  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("kernel_device"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered"),  # NumPy's, of what is tested
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPSILON = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8 if DEVICE == "cuda" else 2**-7}
EACH_FORMAT = pytest.mark.parametrize(
    "format", [format for format in FORMATS.values() if format.bits < 8], ids=lambda format: format.name
)


def draw(format, outputs, inputs, seed=0) -> Codes:
    """Any codes, scales and minimums that the format has."""
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-inputs // format.block)

    def halves():
        values = torch.randn(outputs, blocks, generator=generator)
        return (values.exp2() if format.factor_dtype == torch.bfloat16 else values).to(format.factor_dtype)

    def integers(low, high, dtype, count=blocks * format.block // format.group):
        return torch.randint(low, high, (outputs, count), generator=generator).to(dtype)

    factors = halves()
    floors = factors if layout.has_zero_points(format) else halves() if format.has_floors else None
    return Codes(
        format,
        outputs,
        inputs,
        integers(0, 2**format.bits, torch.uint8, blocks * format.block),
        factors,
        integers(-128, 128, torch.int8) if format.has_scales else None,
        floors,
        integers(0, 128, torch.uint8) if format.has_minimums else None,
    )


def run(x, codes, bias=None, out_dtype=None):
    data = layout.lay_out_tiles(codes).to(DEVICE)
    bias = None if bias is None else to_device(bias, DEVICE)
    return kernels.linear_codes(
        to_device(x, DEVICE), data, bias, codes.outputs, codes.format, out_dtype or x.dtype
    ).cpu()


def draw_x(rows, inputs, dtype=torch.bfloat16, seed=1):
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ==== values ====


@EACH_FORMAT
@pytest.mark.parametrize(
    "rows, outputs, inputs, dtype, out_dtype",
    [
        (1, 1, 1, torch.bfloat16, torch.float32),
        (9, 130, 300, torch.bfloat16, torch.bfloat16),
        (33, 70, 517, torch.float16, torch.float32),
        (3, 65, 260, torch.float32, torch.float32),
    ],
)
def test_against_float64(format, rows, outputs, inputs, dtype, out_dtype):
    codes, x = draw(format, outputs, inputs), draw_x(rows, inputs, dtype)
    bias = torch.arange(float(outputs)) if outputs % 2 else None
    out = run(x, codes, bias, out_dtype)
    assert out.dtype == out_dtype and out.shape == (rows, outputs)
    expected = torch.einsum("rk,nk->rn", x.double(), codes.values().double())
    expected += 0 if bias is None else bias.double()
    # The parts of a value, which its difference may be far smaller than.
    parts = Codes(format, outputs, inputs, codes.codes, codes.factors, codes.scales).values().abs()
    if codes.floors is not None:
        parts = parts + (parts - codes.values()).abs() + codes.values().abs()
    size = x.double().abs() @ parts.double().T + expected.abs()
    allowed = size * 2**-24 * (8 + inputs**0.5) + 1.01 * EPSILON[out_dtype] * expected.abs()
    assert_close(out.double(), expected, atol=allowed)


@EACH_FORMAT
@pytest.mark.parametrize("splits", [1, 2, 3])
def test_integers_are_exact(format, splits, monkeypatch):
    """Each product is seen once: any number of splits and rows of a launch, and no rounding to hide behind."""
    monkeypatch.setattr(kernels, "MOST_SPLITS", splits)
    monkeypatch.setattr(kernels, "MOST_ROWS", 32)
    codes = draw(format, 70, 517)
    codes.factors.copy_(codes.factors > 0)
    if codes.floors is not None:
        codes.floors.copy_(codes.floors > 0.5)
    generator = torch.Generator().manual_seed(1)
    x, bias = torch.randint(-9, 10, (37, 517), generator=generator), torch.arange(70.0)
    expected = (x[:, None] * codes.values().long()).sum(2) + bias.long()
    assert torch.equal(run(x.bfloat16(), codes, bias, torch.float32), expected.float())


@EACH_FORMAT
def test_what_is_laid_out_is_read_back(format):
    codes = draw(format, 300, 517)
    data = layout.lay_out_tiles(codes)
    assert data.shape == (3, -(-codes.codes.shape[1] // layout.tile_inputs(format)), layout.tile_bytes(format))
    bits = 8 * layout.tile_bytes(format) / 128 / layout.tile_inputs(format)
    assert bits <= (4 if format.bits <= 4 else 6) + 1.5
    index = torch.tensor([0, 299, 128, 127, 0])
    assert torch.equal(layout.read_tiles(data, format, 517, index).values(), codes.values()[index])


def test_what_cannot_be_laid_out():
    codes = draw(FORMATS["q4_k"], 3, 40)
    codes.minimums[1, 2] = 128
    with pytest.raises(ValueError, match="minimums must be at most 127, got 128"):
        layout.lay_out_tiles(codes)
    codes = draw(FORMATS["int4_32"], 3, 40)
    codes = Codes(codes.format, 3, 40, codes.codes, codes.factors, None, codes.factors * 2, codes.minimums)
    with pytest.raises(ValueError, match="floors must be the factors for int4_32"):
        layout.lay_out_tiles(codes)


def test_strided_rows_and_what_lies_beside_them():
    codes, x = draw(FORMATS["q4_k"], 40, 300), draw_x(5, 300)
    store = torch.full((12, 400), torch.nan, dtype=x.dtype)
    view = store[1:11:2, 3:303]
    view.copy_(x)
    assert torch.equal(run(view, codes), run(x, codes))
    assert torch.equal(run(x[2:3].expand(4, -1), codes), run(x, codes)[[2] * 4])


def test_no_rows():
    assert run(draw_x(0, 70), draw(FORMATS["q4_0"], 3, 70)).shape == (0, 3)


# ==== the row rule ====


@pytest.mark.parametrize("name", ["q4_k", "int4_128", "iq4_xs", "q4_1", "q6_k", "q5_0"])
@pytest.mark.parametrize("dtype", EPSILON, ids=str)
def test_a_row_has_the_bits_that_it_has_alone(name, dtype):
    """Whatever tile of rows it falls in: of 8, 16, 32 or 64."""
    outputs, inputs, most = (130, 1100, 130) if DEVICE == "cuda" else (20, 300, 70)
    codes, x, bias = draw(FORMATS[name], outputs, inputs), draw_x(most, inputs, dtype), torch.arange(float(outputs))
    alone = {t: run(x[t : t + 1], codes, bias) for t in (0, 1, 9, 31, 63, most - 1)}
    for rows in (2, 8, 13, 32, 64, most):
        out = run(x[:rows], codes, bias)
        for t, row in alone.items():
            assert t >= rows or torch.equal(out[t : t + 1], row), (rows, t)
    assert torch.equal(run(x.flip(0), codes, bias), out.flip(0))


def test_splits_depend_on_the_weight_alone():
    for outputs in range(512, 8193, 512):
        for inputs in (2048, 4096, 5000, 14336):
            splits, tiles = kernels.split(outputs, -(-inputs // 128))
            assert (splits - 1) * tiles * 128 < inputs <= splits * tiles * 128
            assert splits * -(-outputs // 128) <= 4 * 132  # multiprocessors


# ==== values that must not spread ====


@pytest.mark.parametrize("name", ["q4_0", "q4_k", "q6_k"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_what_is_not_finite_stays_in_its_row(name, bad):
    codes, x = draw(FORMATS[name], 40, 300), draw_x(6, 300)
    expected = run(x, codes)
    x[3, 140] = bad
    out = run(x, codes)
    assert not out[3].isfinite().any()
    others = [0, 1, 2, 4, 5]
    assert torch.equal(out[others], expected[others])


@EACH_FORMAT
def test_zeros_leave_the_bias(format):
    codes, x, bias = draw(format, 40, 150), draw_x(3, 150), torch.arange(40.0)
    assert torch.equal(run(x * 0, codes, bias, torch.float32), bias.expand(3, -1))
    codes.factors.zero_()
    if codes.floors is not None:
        codes.floors.zero_()
    assert torch.equal(run(x, codes, bias, torch.float32), bias.expand(3, -1))


# ==== what the interpreter does not run ====


def execute(text: str, operands: dict[str, list[int]], dtype) -> dict[str, list[int]]:
    """What straight-line PTX does with 32-bit registers, for each element of the operands."""
    values, count = dict(operands), len(next(iter(operands.values())))
    for line in re.findall(r"([a-z][^;{}]*);", text):
        if line.startswith(".reg") or "reg " in line:
            continue
        name, rest = line.split(" ", 1)
        target, *sources = rest.replace(" ", "").split(",")
        read = [values[s] if s in values else [int(s, 0)] * count for s in sources]
        values[target] = [OPERATIONS[name.split(".")[0]](*each, dtype) for each in zip(*read, strict=True)]
    return values


def permute(a, b, selector, dtype):
    both = (a | b << 32).to_bytes(8, "little")
    assert selector & 0x8888 == 0  # copies of signs
    return int.from_bytes(bytes(both[selector >> 4 * i & 7] for i in range(4)), "little")


def multiply_add(a, b, c, dtype):
    a, b, c = (torch.tensor([x & 0xFFFF, x >> 16]).to(torch.int16).view(dtype).double() for x in (a, b, c))
    low, high = (a * b + c).to(dtype).view(torch.int16).tolist()
    return low & 0xFFFF | (high & 0xFFFF) << 16


def and_or(a, b, c, table, dtype):
    assert table == 0xEA
    return a & b | c


OPERATIONS = {
    "mov": lambda a, dtype: a,
    "and": lambda a, b, dtype: a & b,
    "shl": lambda a, b, dtype: a << b & 0xFFFFFFFF,
    "shr": lambda a, b, dtype: a >> b,
    "lop3": and_or,
    "prmt": permute,
    "fma": multiply_add,
}


def numbers(pairs: list[int], dtype) -> torch.Tensor:
    """[n, 2] of n registers."""
    return torch.tensor([[p & 0xFFFF, p >> 16] for p in pairs]).to(torch.int16).view(dtype).float()


@EACH_FORMAT
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_codes_become_levels(format, dtype):
    """The PTX of a GPU, which takes another way than the interpreter."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 2**16, (40, 2), generator=generator)
    words &= 0xFFFF if format.bits >= 4 else 0x1111 * (2**format.bits - 1)
    minimums = torch.randint(0, 128, (40, 4), generator=generator) * layout.has_zero_points(format)
    constants = kernels.constants_of(format, dtype, is_cuda=True)
    operands = {"$4": (words[:, 0] | words[:, 1] << 16).tolist()}
    highs = torch.zeros(40, 2, dtype=torch.int64)
    if format.bits > 4:
        highs = torch.randint(0, 2**8, (40, 2), generator=generator) & (0xFF if format.bits == 6 else 0x55)
        extended = highs | (highs >> 7) * 0xFF00  # as a byte with a sign becomes 16 bits
        operands["$9"] = (extended[:, 0] | extended[:, 1] << 16).tolist()
    for plane in range(4):
        operands[f"${5 + plane}"] = ((minimums[:, plane] | constants["LESS"]) * 0x10001).tolist()
    found = execute(constants["UNPACK"], operands, dtype)
    levels = torch.tensor(format.levels)
    for plane in range(4):
        codes = words >> 4 * plane & 15 | (highs >> 2 * plane & 3) << 4
        expected = levels[codes] - minimums[:, plane, None]
        assert torch.equal(numbers(found[f"${plane}"], dtype), expected.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_bytes_become_pairs_of_numbers(dtype):
    bytes_ = torch.arange(128).view(32, 4)
    words = [int.from_bytes(bytes(row), "little") for row in bytes_.tolist()]
    found = execute(kernels.spread_asm(dtype), {"$4": words}, dtype)
    for byte in range(4):
        assert torch.equal(numbers(found[f"${byte}"], dtype), bytes_[:, byte, None].expand(-1, 2).float())
