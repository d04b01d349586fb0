"""linear for weights in few bits: the layout, every instruction set against float64, and the row rule bit for bit."""

import dataclasses
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyspec.ops.linear import JoinedWeight, LinearWeight, linear
from pyspec.ops.linear import lay_out_weight as lay_out_any
from pyspec.ops.linear_codes import lay_out_codes, take_apart
from pyspec.ops.weight_formats import FORMATS, Codes
from tests.helpers.every_backend import KERNELS, assert_same, each_backend, each_kernel, on_backend, same_bits
from tests.helpers.linear_cases import FLOATS, random
from tests.helpers.weight_formats import lay_out_parts, random_codes

run, kernel = each_backend(linear, "linear_codes"), each_kernel(linear, "linear_codes")
NAMES = list(FORMATS)
each_format = pytest.mark.parametrize("name", NAMES)
PARTS = [("q4_k", 45), ("q4_k", 55), ("q6_k", 70), ("q8_0", 1)]
MANY = 28  # rows, of which every kernel takes its way for many
SIZES = [(1, 256), (33, 256), (70, 768)]  # outputs, inputs


def lay_out_weight(weight, *options) -> LinearWeight:
    """The weight in its own format: lay_out_weight makes int8 of q8_0, which linear_codes reads as a part of others."""
    if isinstance(weight, Codes):
        return LinearWeight(lay_out_codes(weight), weight.outputs, weight.inputs, weight.format)
    return lay_out_any(weight, *options)


def inputs_of(name: str, inputs: int) -> int:
    """Formats of a file have whole blocks; int4 has not, and blocks of 32 need not fill a chunk of 256 inputs."""
    return inputs - 3 if name.startswith("int4") else inputs - 96 if FORMATS[name].block == 32 else inputs


def rounded(x: np.ndarray, block: int) -> np.ndarray:
    """Rows rounded to 8 bits in blocks, in float64."""
    blocks = np.pad(x, ((0, 0), (0, -x.shape[1] % block))).reshape(len(x), -1, block)
    largest = np.abs(blocks).max(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        integers = np.where(largest > 0, np.rint(blocks * (np.float32(127) / largest)), 0)
    values = integers.astype(np.float64) * (largest / np.float32(127))
    return values.reshape(len(x), -1)[:, : x.shape[1]]


def assert_close(found: torch.Tensor, x: torch.Tensor, codes: Codes) -> None:
    """In a kernel a block adds two terms, each rounded a few times; the reference adds K of them."""
    without = dataclasses.replace(codes, floors=None, minimums=None).values().double().numpy()
    floors = 0 * without
    if codes.floors is not None:
        floors = -dataclasses.replace(codes, factors=0 * codes.factors).values().double().numpy()
    rows = rounded(x.float().numpy(), codes.format.block)
    expected, size = rows @ (without - floors).T, np.abs(rows) @ (np.abs(without) + np.abs(floors)).T
    terms = 2 * x.shape[1] // codes.format.block if os.environ.get("PYSPEC_ISA") else 2 * x.shape[1]
    error, bound = np.abs(found.double().numpy() - expected), size * (terms + 8) * 2.0**-24 + 2.0**-126
    assert (error <= bound).all(), f"off by {(error / bound).max():.3g} times the bound"


# ==== the layout ====


def place_of(name: str, k: int, n: int, plane: int) -> tuple[int, int]:
    """Byte in its block, and lowest bit there, of a plane's part of the code of input k and output n."""
    format = FORMATS[name]
    low = 2 if format.bits < 4 else 4 if format.bits < 8 else 8
    has_zero_point = format.has_minimums and not format.has_scales
    at = 64 + (64 if format.has_floors and not has_zero_point else 0)
    bytes_of_group = 1 if name == "q2_k" else format.has_scales + format.has_minimums
    at += 32 * format.block // format.group * bytes_of_group
    bits = low if plane == 0 else format.bits - low
    at += plane * 32 * format.block * low // 8
    four, per_byte = k // 4, 8 // bits
    return at + (four // per_byte * 32 + n) * 4 + k % 4, four % per_byte * bits


@each_format
def test_every_code_has_its_place(name):
    codes = random_codes(name, 35, 512)
    format = codes.format
    data = lay_out_codes(codes)
    assert data.shape[:2] == (2, 512 // format.block)
    for n, k in [(0, 0), (0, 1), (34, 511), (33, 300), (31, 255), (7, 36), (32, 64), (1, 127)]:
        block = data[n // 32, k // format.block]
        value, low = 0, 2 if format.bits < 4 else 4 if format.bits < 8 else 8
        for plane, width in enumerate((low, format.bits - low)):
            if width:
                byte, bit = place_of(name, k % format.block, n % 32, plane)
                value |= (int(block[byte]) >> bit & 2**width - 1) << (plane * low)
        assert value == codes.codes[n, k]
        assert block[2 * (n % 32) : 2 * (n % 32) + 2].view(format.factor_dtype) == codes.factors[n, k // format.block]


@each_format
@pytest.mark.parametrize("outputs, inputs", SIZES)
def test_a_layout_keeps_every_bit(name, outputs, inputs):
    codes = random_codes(name, outputs, inputs_of(name, inputs))
    data = lay_out_codes(codes)
    back = take_apart(data, codes.format, codes.outputs, codes.inputs)
    for field in dataclasses.fields(Codes):
        expected, found = getattr(codes, field.name), getattr(back, field.name)
        assert torch.equal(found, expected) if isinstance(expected, torch.Tensor) else found == expected, field.name
    panels = data.shape[0] * 32
    bits = data.numel() * 8 / (panels * data.shape[1] * codes.format.block)
    # of a file's bits nothing is added but up to two for each group: scales and minimums take whole bytes
    assert bits <= codes.format.bits + 32 / codes.format.block + 16 / codes.format.group


@each_format
def test_rows(kernel, name):
    laid_out = lay_out_weight(codes := random_codes(name, 70, inputs_of(name, 768)))
    assert laid_out.dtype == name and torch.equal(laid_out.unpack(), codes.values())
    index = torch.tensor([69, 0, 31, 32, 40, 40])
    assert torch.equal(laid_out.rows(index), codes.values()[index])
    with on_backend("reference"):
        assert torch.equal(laid_out.rows(index), codes.values()[index])
    assert laid_out.rows(index[:0]).shape == (0, codes.inputs)
    with pytest.raises(RuntimeError, match=r"index must be in \[0, 70\), got 70 at 1"):
        laid_out.rows(torch.tensor([0, 70]))


def test_q8_0_is_int8():
    codes = random_codes("q8_0", 70, 160)
    laid_out = lay_out_any(codes)
    assert laid_out.dtype == torch.int8 and torch.equal(laid_out.unpack(), codes.values())
    x = random(3, 160)
    assert_close(linear(x, laid_out), x, codes)


def test_int4_of_a_matrix():
    weight = random(40, 100)
    laid_out = lay_out_weight(weight, "int4")
    assert laid_out.dtype == "int4_32" and laid_out.nbytes == 64 * 4 * (16 + 3)
    assert (laid_out.unpack() - weight).square().mean() < 0.01


# ==== products ====


@each_format
@pytest.mark.parametrize("x_dtype", FLOATS, ids=str)
def test_matches_float64(run, name, x_dtype):
    for outputs, inputs in SIZES:
        codes = random_codes(name, outputs, inputs_of(name, inputs))
        for rows in (1, 2, 7, MANY):
            x = random(rows, codes.inputs, dtype=x_dtype, seed=1)
            found = run(x, lay_out_weight(codes), out_dtype=torch.float32)
            assert found.shape == (rows, outputs)
            assert_close(found, x, codes)


def extreme(name: str) -> Codes:
    """The largest and the smallest of everything, side by side: what sums of 16 and 32 bits must hold."""
    codes = random_codes(name, 64, 512)
    top, minimum = 2**codes.format.bits - 1, 15 if codes.format.bits == 2 or name.startswith("int4") else 63
    codes.codes[:] = top
    codes.codes[1::2] = 0
    codes.factors[:] = 1
    if codes.scales is not None:
        codes.scales[:] = 15 if codes.format.bits == 2 else 63 if codes.format.has_minimums else -128
    if codes.minimums is not None:
        codes.minimums[:] = minimum
    return codes


@each_format
def test_nothing_overflows(run, name):
    codes = extreme(name)
    x = torch.ones(4, 512)
    x[1], x[2, ::2], x[3, 1::4] = -1, -1, -1
    many = x.repeat(MANY // 4, 1)
    for rows in (x, many):
        assert_close(run(rows, lay_out_weight(codes), out_dtype=torch.float32), rows, codes)


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(st.data())
def test_random_shapes(data):
    name = data.draw(st.sampled_from(NAMES))
    unit = 1 if name.startswith("int4") else FORMATS[name].block
    inputs = data.draw(st.integers(1, max(1, 600 // unit))) * unit
    rows, outputs, seed = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 100)), data.draw(st.integers(0, 99))
    codes = random_codes(name, outputs, inputs, seed)
    x = random(rows, inputs, dtype=data.draw(st.sampled_from(FLOATS)), seed=seed + 1)
    for backend in ["reference", *KERNELS]:
        with on_backend(backend):
            found = linear(x, weight := lay_out_weight(codes), out_dtype=torch.float32)
            assert_close(found, x, codes)
            if backend != "reference":
                row = data.draw(st.integers(0, rows - 1))
                assert same_bits(found[row : row + 1], linear(x[row : row + 1], weight, out_dtype=torch.float32))


@each_format
def test_row_rule(kernel, name):
    """T rows have the bits of T calls, for every T, whatever the number of threads."""
    threads = torch.get_num_threads()
    weight = lay_out_weight(codes := random_codes(name, 45, inputs_of(name, 768)))
    x = random(70, codes.inputs, seed=1)
    expected = torch.cat([linear(x[i : i + 1], weight) for i in range(len(x))])
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for rows in (*(range(1, 34) if count == 1 else (1, 2, 9, 33)), 64, 65, 70):
                assert same_bits(kernel(x[:rows], weight), expected[:rows]), rows
                assert same_bits(kernel(x[-rows:], weight), expected[-rows:]), rows
    finally:
        torch.set_num_threads(threads)


@each_format
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_row_stays_alone(run, name, value):
    weight = lay_out_weight(codes := random_codes(name, 45, inputs_of(name, 512)))
    x = random(9, codes.inputs, seed=1)
    clean = run(x, weight)
    for row in (0, 4, 8):
        bad = x.clone()
        bad[row, 200 - row] = value
        found = run(bad, weight)
        others = [i for i in range(9) if i != row]
        assert found[row].isnan().all()
        assert_same(found[others], clean[others])


@each_format
def test_bias_strides_and_out_dtype(kernel, name):
    weight = lay_out_weight(codes := random_codes(name, 45, inputs_of(name, 512)))
    x, bias = random(2, 3, codes.inputs, seed=1), random(45, seed=2)
    total = kernel(x, weight)
    assert total.shape == (2, 3, 45)
    for out_dtype in FLOATS:
        assert same_bits(kernel(x, weight, bias, out_dtype=out_dtype), (total + bias).to(out_dtype))
    wide = random(6, codes.inputs + 10)
    wide[:, 5:-5] = x.flatten(0, 1)
    assert same_bits(kernel(wide[::2, 5:-5], weight), total.flatten(0, 1)[::2].contiguous())
    assert kernel(x[:0], weight).shape == (0, 3, 45)


@each_format
def test_nothing_is_left_over_from_another_call(kernel, name):
    """Kernels share a buffer: what a larger call wrote there must not be read as this one's padding."""
    codes = random_codes(name, 33, inputs_of(name, 256))
    x, weight = random(5, codes.inputs), lay_out_weight(codes)
    expected = kernel(x, weight)
    kernel(torch.full((40, 1024), torch.nan), lay_out_weight(random_codes(name, 3, 1024)))
    assert same_bits(kernel(x, weight), expected)


def test_parts_of_several_formats(kernel):
    """Weights one below another: each has the bits that it has alone."""
    parts = [random_codes(name, outputs, 512, seed) for seed, (name, outputs) in enumerate(PARTS)]
    joined = lay_out_parts(parts)
    assert isinstance(joined, JoinedWeight) and joined.dtype == "q4_k, q6_k, q8_0" and joined.outputs == 171
    assert torch.equal(joined.unpack(), torch.cat([part.values() for part in parts]))
    assert torch.equal(joined.rows(torch.tensor([3, 100])), joined.unpack()[[3, 100]])
    x, bias = random(7, 512, seed=9), random(171, seed=10)
    biases = bias.split([part.outputs for part in parts])
    alone = [kernel(x, lay_out_weight(part), bias) for part, bias in zip(parts, biases, strict=True)]
    assert same_bits(kernel(x, joined, bias), torch.cat(alone, 1))
    with on_backend("reference"):
        torch.testing.assert_close(linear(x, joined, bias), torch.cat(alone, 1), rtol=1e-4, atol=1e-2)
    args = (x, joined.data, bias, [100, 70, 1], [NAMES.index(name) for name in ("q4_k", "q6_k", "q8_0")])
    torch.library.opcheck(torch.ops.pyspec.linear_joined.default, (*args, torch.float32))
    with pytest.raises(RuntimeError, match="outputs and formats must be as many, got 3 and 2"):
        torch.ops.pyspec.linear_joined(*args[:4], args[4][:2], torch.float32)
    with pytest.raises(RuntimeError, match="weight must be laid out for these outputs and inputs"):
        torch.ops.pyspec.linear_joined(*args[:3], [100, 70, 33], args[4], torch.float32)


def test_parts_of_one_format_are_one_weight():
    parts = [random_codes("q5_k", outputs, 256, outputs) for outputs in (3, 40)]
    laid_out = lay_out_parts(parts)
    assert laid_out.dtype == "q5_k" and torch.equal(laid_out.unpack(), torch.cat([part.values() for part in parts]))


# ==== the op as torch sees it, and bad input ====


@pytest.mark.parametrize("name", ["q4_k", "q6_k"])
def test_opcheck(name):
    weight, place = lay_out_weight(random_codes(name, 45, 512)), NAMES.index(name)
    args = (random(5, 512), weight.data, random(45), 45, place, torch.float32)
    torch.library.opcheck(torch.ops.pyspec.linear_codes.default, args)
    torch.library.opcheck(
        torch.ops.pyspec.linear_codes_rows.default, (torch.tensor([3, 44]), weight.data, 45, 512, place)
    )


@pytest.mark.skipif(not KERNELS, reason="the compiled kernel does these checks")
@pytest.mark.parametrize(
    "change",
    [
        {"outputs": 65},
        {"outputs": 32},
        {"outputs": 0},
        {"outputs": -45},
        {"outputs": 2**63 - 1},
        {"format": -1},
        {"format": NAMES.index("q6_k")},
        {"format": len(FORMATS)},
        {"x": lambda x: x[:, :200]},
        {"x": lambda x: x[0]},
        {"x": lambda x: x.T.contiguous().T},
        {"x": lambda x: x.double()},
        {"weight": lambda w: w[:1]},
        {"weight": lambda w: w[:0]},
        {"weight": lambda w: torch.cat((w, w))[::2]},
        {"weight": lambda w: w.char()},
        {"bias": torch.zeros(44)},
        {"bias": torch.zeros(45).half()},
        {"out_dtype": torch.int32},
    ],
)
def test_direct_calls_cannot_read_outside(change):
    args = {"x": random(5, 512), "weight": lay_out_codes(random_codes("q4_k", 45, 512)), "bias": torch.zeros(45)}
    args |= {"outputs": 45, "format": NAMES.index("q4_k"), "out_dtype": torch.float32}
    torch.ops.pyspec.linear_codes(*args.values())
    for name, value in change.items():
        args[name] = value(args[name]) if callable(value) else value
    if "outputs" in change:
        args["bias"] = None
    with pytest.raises(RuntimeError):
        torch.ops.pyspec.linear_codes(*args.values())


def test_format_numbers_are_those_of_the_kernel():
    for name in NAMES:  # a number that means another format would not fit the bytes
        weight = lay_out_weight(random_codes(name, 32, 256))
        assert torch.equal(weight.rows(torch.arange(32)), weight.unpack())
