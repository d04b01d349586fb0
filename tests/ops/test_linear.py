"""linear: every backend and instruction set against float64, and the row rule bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyspec.ops.linear import lay_out_weight, linear, linear_reference
from tests.helpers.every_backend import KERNELS, assert_same, each_backend, each_kernel, on_backend, same_bits
from tests.helpers.linear_cases import FLOATS, PACKED, SIZES, padded_groups, random, rounded_weight

INPUTS = [(dtype, dtype) for dtype in FLOATS] + [(dtype, torch.int8) for dtype in FLOATS]  # of x, of the weight
run, kernel = each_backend(linear), each_kernel(linear)


def alone(x: torch.Tensor, *args, **options) -> torch.Tensor:
    """Every row in a call of its own."""
    return torch.cat([linear(x[i : i + 1], *args, **options) for i in range(len(x))])


# ==== float64, in numpy ====


def rounded_x(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales [R, G] fp32 and integers [R, G, 32] of fp32 rows."""
    groups = padded_groups(x)
    scales, integers = np.zeros(groups.shape[:2], np.float32), np.zeros(groups.shape, np.int64)
    for r, row in enumerate(groups):
        for g, group in enumerate(row):
            largest = np.abs(group).max()
            scales[r, g] = largest / np.float32(127)
            if largest > 0:
                integers[r, g] = np.rint(group * (np.float32(127) / largest))
    return scales, integers


def oracle(x: torch.Tensor, weight: torch.Tensor, packed: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """x times weight as `packed` stores it, and the sum of the products' sizes, which bounds the error."""
    if packed != torch.int8:
        a, b = x.double().numpy(), weight.to(packed).double().numpy()
        return np.einsum("rk,nk->rn", a, b), np.einsum("rk,nk->rn", abs(a), abs(b))
    x_scales, x_integers = rounded_x(x.float().numpy())
    w_scales, w_integers = rounded_weight(weight.float().numpy())
    out = np.zeros((len(x), len(weight)))
    size = np.zeros_like(out)
    for g in range(x_scales.shape[1]):
        scale = x_scales[:, None, g].astype(np.float64) * w_scales[None, :, g].astype(np.float64)
        out += scale * (x_integers[:, g] @ w_integers[:, g].T)
        size += scale * (abs(x_integers[:, g]) @ abs(w_integers[:, g]).T)
    return out, size


def assert_close(found: torch.Tensor, expected: np.ndarray, size: np.ndarray, inputs: int) -> None:
    """A sum of K terms in fp32 is off by at most about K half units of the terms' sizes, whatever its order."""
    error = np.abs(found.double().numpy() - expected)
    bound = size * (inputs + 5) * 2.0**-24 + 2.0**-126
    assert (error <= bound).all(), f"off by {(error / bound).max():.3g} times the bound"


@pytest.mark.parametrize("x_dtype, packed", INPUTS, ids=str)
def test_matches_float64(run, x_dtype, packed):
    for outputs, inputs in SIZES:
        for rows in (1, 2, 7, 9):
            x, weight = random(rows, inputs, dtype=x_dtype), random(outputs, inputs, seed=1)
            weight = weight.to(x_dtype)
            found = run(x, lay_out_weight(weight, packed), out_dtype=torch.float32)
            assert found.shape == (rows, outputs)
            assert_close(found, *oracle(x, weight, packed), inputs)


@settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(st.data())
def test_random_shapes(data):
    rows, outputs, inputs = (data.draw(st.integers(1, most)) for most in (20, 100, 200))
    x_dtype, packed = data.draw(st.sampled_from(INPUTS))
    x_size, weight_size = (data.draw(st.sampled_from([1e-3, 1.0, 100.0])) for _ in range(2))
    seed = data.draw(st.integers(0, 99))
    x = (random(rows, inputs, seed=seed) * x_size).to(x_dtype)
    weight = (random(outputs, inputs, seed=seed + 1) * weight_size).to(x_dtype)
    data_packed = lay_out_weight(weight, packed)
    expected = oracle(x, weight, packed)
    for name in ["reference", *KERNELS]:
        if name == "reference":
            found = linear_reference(x, data_packed.data, None, outputs, torch.float32)
        else:
            with on_backend(name):
                found = linear(x, data_packed, out_dtype=torch.float32)
                row = data.draw(st.integers(0, rows - 1))
                assert same_bits(found[row : row + 1], linear(x[row : row + 1], data_packed, out_dtype=torch.float32))
        assert_close(found, *expected, inputs)


@pytest.mark.parametrize("packed", PACKED, ids=str)
def test_large_shapes(kernel, packed):
    """The shape of a layer, which crosses caches and threads, and a prompt's worth of rows."""
    dtype = torch.float32 if packed == torch.int8 else packed
    x, weight = random(300, 576, dtype=dtype), random(99, 576, dtype=dtype, seed=1)
    data = lay_out_weight(weight, packed)
    found = kernel(x, data, out_dtype=torch.float32)
    assert_close(found, *oracle(x, weight, packed), 576)
    for rows in ((0, 1), (297, 298), (299, 300), (13, 50)):
        assert same_bits(found[slice(*rows)], kernel(x[slice(*rows)], data, out_dtype=torch.float32))


# ==== the row rule ====


@pytest.mark.parametrize("x_dtype, packed", INPUTS, ids=str)
def test_row_rule(kernel, x_dtype, packed):
    """T rows have the bits of T calls, for every T, whatever the number of threads."""
    threads = torch.get_num_threads()
    x, weight = random(64, 77, dtype=x_dtype), lay_out_weight(random(45, 77, dtype=x_dtype, seed=1), packed)
    expected = alone(x, weight)
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for rows in range(1, 65, 1 if count == 1 else 9):
                assert same_bits(kernel(x[:rows], weight), expected[:rows]), rows
                assert same_bits(kernel(x[-rows:], weight), expected[-rows:]), rows
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("packed", PACKED, ids=str)
def test_row_rule_with_bias_in_a_real_layer(kernel, packed):
    dtype = torch.bfloat16 if packed == torch.int8 else packed
    x, weight = random(11, 1537, dtype=dtype), lay_out_weight(random(163, 1537, dtype=dtype, seed=1), packed)
    bias = random(163)
    for out_dtype in FLOATS:
        expected = alone(x, weight, bias, out_dtype=out_dtype)
        order = torch.randperm(11)
        assert same_bits(kernel(x, weight, bias, out_dtype=out_dtype), expected)
        assert same_bits(kernel(x[order], weight, bias, out_dtype=out_dtype), expected[order])


def test_the_row_rule_is_not_a_matter_of_course():
    """A sum whose order depends on the number of rows breaks it, in last bits: the tests above would notice."""
    x, weight = random(64, 577), lay_out_weight(random(163, 577, seed=1))

    def order_dependent(x):  # of rows in company, the sums go by way of 1
        return linear(x, weight) if len(x) == 1 else linear(x, weight) + 1 - 1

    together, each = order_dependent(x), torch.cat([order_dependent(x[i : i + 1]) for i in range(64)])
    torch.testing.assert_close(together, each, atol=1e-4, rtol=1e-4)
    assert not same_bits(together, each)


# ==== other values ====


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("x_dtype, packed", INPUTS, ids=str)
def test_a_bad_row_stays_alone(run, x_dtype, packed, value):
    x, weight = random(9, 77, dtype=x_dtype), lay_out_weight(random(45, 77, dtype=x_dtype, seed=1), packed)
    clean = run(x, weight)
    for row in (0, 4, 8):
        bad = x.clone()
        bad[row, 76 - row] = value
        found = run(bad, weight)
        others = [i for i in range(9) if i != row]
        assert not found[row].isfinite().any()
        if packed == torch.int8:  # the group has no scale any more
            assert found[row].isnan().all()
        assert_same(found[others], clean[others])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_nan_weight_reaches_its_output_only(run, dtype):
    x, weight = random(9, 77, dtype=dtype), random(45, 77, dtype=dtype, seed=1)
    x[3] = 0
    clean = run(x, lay_out_weight(weight))
    for output, inputs in ((0, 0), (31, 76), (44, 76)):
        bad = weight.clone()
        bad[output, inputs] = torch.nan
        found = run(x, lay_out_weight(bad))
        others = [i for i in range(45) if i != output]
        assert found[:, output].isnan().all()
        assert_same(found[:, others].contiguous(), clean[:, others].contiguous())


@pytest.mark.parametrize("x_dtype, packed", INPUTS, ids=str)
def test_nothing_is_left_over_from_another_call(kernel, x_dtype, packed):
    """Kernels share a buffer: what a larger call wrote there must not be read as this one's padding."""
    x, weight = random(5, 63, dtype=x_dtype), lay_out_weight(random(33, 63, dtype=x_dtype, seed=1), packed)
    expected = kernel(x, weight)
    kernel(torch.full((40, 200), torch.nan, dtype=x_dtype), lay_out_weight(torch.ones(3, 200, dtype=x_dtype), packed))
    assert same_bits(kernel(x, weight), expected)


@pytest.mark.parametrize("packed", [torch.float32, torch.int8], ids=str)
def test_tiny_and_huge_rows(run, packed):
    """A largest value without a reciprocal in fp32 counts as 0 in int8; nothing becomes infinite on the way."""
    x = torch.zeros(6, 40)
    x[1], x[2], x[3], x[4], x[5] = 1e-44, 1e-39, 1e-37, 1e-35, 1e38
    weight = torch.full((3, 40), 0.01)
    found = run(x, lay_out_weight(weight, packed))
    expected = x.double() @ weight.double().T
    assert found.isfinite().all()
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-37 if packed == torch.int8 else 1e-43)


# ==== shapes, strides, dtypes ====


@pytest.mark.parametrize("x_dtype, packed", INPUTS, ids=str)
def test_shapes_and_strides(run, x_dtype, packed):
    weight = lay_out_weight(random(45, 77, dtype=x_dtype, seed=1), packed)
    x = random(2, 3, 77, dtype=x_dtype)
    expected = run(x, weight)
    assert expected.shape == (2, 3, 45) and expected.dtype == x_dtype and expected.is_contiguous()
    assert_same(run(x.flatten(0, 1), weight), expected.flatten(0, 1))
    assert_same(run(x[1, 2], weight), expected[1, 2])
    wide = random(2, 3, 90, dtype=x_dtype)
    wide[..., 5:82] = x
    assert_same(run(wide[..., 5:82], weight), expected)
    assert_same(run(wide.flatten(0, 1)[::2, 5:82], weight), expected.flatten(0, 1)[::2].contiguous())
    swapped = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert_same(run(swapped, weight), expected)
    assert_same(run(x[0, :1].expand(4, 77), weight), expected[0, :1].expand(4, 45).contiguous())
    for shape in ((0, 77), (0, 3, 77), (2, 0, 77)):
        assert run(x.new_empty(shape), weight).shape == (*shape[:-1], 45)


def test_one_input_may_have_any_stride(run):
    x = random(4, 6)
    weight = lay_out_weight(random(5, 1, seed=1))
    assert_same(run(x[:, 2:3], weight), run(x[:, 2:3].contiguous(), weight))
    assert_same(run(x.T[:, 2:3], weight), run(x.T[:, 2:3].contiguous(), weight))


@pytest.mark.parametrize("x_dtype, packed", INPUTS, ids=str)
def test_bias_and_out_dtype(run, x_dtype, packed):
    """The fp32 sum, plus the bias in fp32, rounded once."""
    weight = lay_out_weight(random(45, 77, dtype=x_dtype, seed=1), packed)
    x = random(5, 77, dtype=x_dtype)
    total = run(x, weight, out_dtype=torch.float32)
    assert_same(run(x, weight), total.to(x_dtype))
    for out_dtype in FLOATS:
        assert_same(run(x, weight, out_dtype=out_dtype), total.to(out_dtype))
        for bias_dtype in (*FLOATS, torch.float64):
            for bias in (random(45, dtype=bias_dtype, seed=2), random(90, dtype=bias_dtype, seed=2)[::2]):
                found = run(x, weight, bias, out_dtype=out_dtype)
                assert_same(found, (total + bias.float()).to(out_dtype))


def test_results_beyond_fp16(run):
    found = run(
        torch.full((1, 64), 1e4), lay_out_weight(torch.tensor([[1.0], [-1.0]]).expand(2, 64)), out_dtype=FLOATS[1]
    )
    assert found.tolist() == [[torch.inf, -torch.inf]]


def test_a_plain_weight_is_laid_out(run):
    x, weight = random(5, 77), random(45, 77, seed=1)
    assert_same(run(x, weight), run(x, lay_out_weight(weight)))


# ==== the op as torch sees it ====


@pytest.mark.parametrize("x_dtype, packed", INPUTS[:4], ids=str)
def test_opcheck(x_dtype, packed):
    weight = lay_out_weight(random(45, 77, dtype=x_dtype, seed=1), packed)
    for bias in (None, random(45)):
        args = (random(5, 77, dtype=x_dtype), weight.data, bias, 45, torch.float32)
        torch.library.opcheck(torch.ops.pyspec.linear.default, args)


def test_compiles_as_one_graph():
    def step(x, weight, bias):
        return linear(x * 2, weight, bias)

    x, weight, bias = random(2, 3, 77), random(45, 77, seed=1), random(45)
    for packed, backend in ((torch.float32, "inductor"), (torch.int8, "aot_eager")):
        args = (x, lay_out_weight(weight, packed), bias)
        torch.testing.assert_close(torch.compile(step, fullgraph=True, backend=backend)(*args), step(*args))


def test_a_weight_in_fp32_takes_x_of_any_dtype(kernel):
    x, weight = random(3, 77), lay_out_weight(random(45, 77, seed=1))
    for dtype in FLOATS[1:]:
        found = kernel(x.to(dtype), weight, out_dtype=torch.float32)
        assert same_bits(found, kernel(x.to(dtype).float(), weight))


# ==== bad input ====


@pytest.mark.parametrize(
    "error, message, change",
    [
        (TypeError, "x must be float32, float16 or bfloat16, got torch.float64", lambda x, w: (x.double(), w)),
        (
            TypeError,
            "weight must be int8, in fewer bits, float32, or torch.float16 like x, got torch.bfloat16",
            lambda x, w: (x.half(), lay_out_weight(random(45, 77, dtype=torch.bfloat16))),
        ),
        (TypeError, "weight must be float32, float16 or bfloat16", lambda x, w: (x, torch.zeros(45, 77).double())),
        (ValueError, r"weight must be \[outputs, inputs\] and not empty", lambda x, w: (x, torch.zeros(77))),
        (ValueError, r"x must be \[..., 77\] for this weight, got shape \(5, 76\)", lambda x, w: (x[:, 1:], w)),
        (ValueError, r"x must be \[..., 77\] for this weight, got shape \(\)", lambda x, w: (x[0, 0], w)),
        (ValueError, r"x must be \[..., 77\] for this weight, got shape \(5, 0\)", lambda x, w: (x[:, :0], w)),
        (ValueError, "x must have a contiguous last dimension", lambda x, w: (x.T.contiguous().T, w)),
        (ValueError, "weight must be on meta like x, got cpu", lambda x, w: (x.to("meta"), w)),
        (ValueError, r"bias must be floating point \[45\]", lambda x, w: (x, w, torch.zeros(44))),
        (ValueError, r"bias must be floating point \[45\]", lambda x, w: (x, w, torch.zeros(1, 45))),
        (ValueError, r"bias must be floating point \[45\]", lambda x, w: (x, w, torch.zeros(45, dtype=torch.int32))),
        (ValueError, "bias must be on cpu like x, got meta", lambda x, w: (x, w, torch.zeros(45, device="meta"))),
    ],
)
def test_bad_input_names_the_argument(error, message, change):
    with pytest.raises(error, match=f"^{message}"):
        linear(*change(random(5, 77), lay_out_weight(random(45, 77))))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8], ids=str)
def test_bad_out_dtype(dtype):
    with pytest.raises(TypeError, match=f"^out_dtype must be float32, float16 or bfloat16, got {dtype}"):
        linear(random(5, 77), lay_out_weight(random(45, 77)), out_dtype=dtype)


@pytest.mark.skipif(not KERNELS, reason="the compiled kernel does these checks")
@pytest.mark.parametrize("packed", PACKED, ids=str)
@pytest.mark.parametrize(
    "change",
    [
        {"outputs": 65},  # more panels than there are
        {"outputs": 32},
        {"outputs": 0},
        {"outputs": -45},
        {"outputs": 2**63 - 1},
        {"outputs": 2**56 + 32},  # its size in bytes is that of one panel, modulo 2^64
        {"x": lambda x: x[:, :30]},
        {"x": lambda x: x.repeat(1, 2)},
        {"x": lambda x: x[:, :0]},
        {"x": lambda x: x[0]},
        {"x": lambda x: x[None]},
        {"x": lambda x: x.T.contiguous().T},
        {"x": lambda x: x.double()},
        {"x": lambda x: x.long()},
        {"weight": lambda w: w[:1]},
        {"weight": lambda w: w[:0]},
        {"weight": lambda w: torch.cat((w, w))},
        {"weight": lambda w: torch.cat((w, w))[::2]},
        {"weight": lambda w: w.double()},
        {"weight": lambda w: w.long()},
        {"bias": torch.zeros(44)},
        {"bias": torch.zeros(45, 1)},
        {"bias": torch.zeros(45).half()},
        {"out_dtype": torch.float64},
        {"out_dtype": torch.int32},
    ],
)
def test_direct_calls_cannot_read_outside(packed, change):
    dtype = torch.float32 if packed == torch.int8 else packed
    args = {
        "x": random(5, 64, dtype=dtype),
        "weight": lay_out_weight(random(45, 64, dtype=dtype), packed).data,
        "bias": torch.zeros(45),
        "outputs": 45,
        "out_dtype": torch.float32,
    }
    torch.ops.pyspec.linear(*args.values())
    for name, value in change.items():
        args[name] = value(args[name]) if callable(value) else value
    if "outputs" in change:
        args["bias"] = None
    with pytest.raises(RuntimeError):
        torch.ops.pyspec.linear(*args.values())


@pytest.mark.skipif(not KERNELS, reason="the compiled kernel does these checks")
def test_direct_calls_need_one_dtype():
    for x_dtype in FLOATS:
        for dtype in set(FLOATS) - {x_dtype, torch.float32}:
            weight = lay_out_weight(random(45, 64), dtype).data
            with pytest.raises(RuntimeError, match="weight must be int8 or float32 or have the dtype of x"):
                torch.ops.pyspec.linear(random(5, 64, dtype=x_dtype), weight, None, 45, torch.float32)
