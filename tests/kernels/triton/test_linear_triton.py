"""The Triton kernels of linear: oracles in float64 and in integers, and the row rule bit for bit."""

import pytest
import torch

from tests.helpers.on_gpu import assert_close, to_device

pytest.importorskip("triton", reason="Triton is not installed for this platform")
import triton  # noqa: E402

from pyspec.kernels import linear as kernels  # noqa: E402
from pyspec.ops.linear import _lay_out_int8  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("kernel_device"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered"),  # NumPy's, of what is tested
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Rounding to the nearest, but to zero where the interpreter makes bf16.
EPSILON = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8 if DEVICE == "cuda" else 2**-7}
FORMATS = [*EPSILON, torch.int8]


def run(x, weight, bias=None, is_int8=False, out_dtype=None):
    """The launcher on a weight [N, K], packed in rows as `lay_out_weight` does where there is a GPU."""
    data = _lay_out_int8(weight, in_panels=False) if is_int8 else weight.to(x.dtype).contiguous()
    bias = None if bias is None else to_device(bias, DEVICE)
    return kernels.linear(to_device(x, DEVICE), data.to(DEVICE), bias, weight.shape[0], out_dtype or x.dtype).cpu()


def make(rows, outputs, inputs, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(n, inputs, generator=generator).to(dtype) for n in (rows, outputs))
    return x, weight, torch.randn(outputs, generator=generator)


def rounded(values, scale_dtype=torch.float32):
    """Integers and their scales, both float64 [R, K], as the formula has it: one group at a time."""
    groups = []
    for part in values.float().split(32, 1):
        largest = part.abs().amax(1, keepdim=True)
        top = torch.full_like(largest, 127)
        scale = (largest / top).to(scale_dtype).float()
        factor = top / largest if scale_dtype == torch.float32 else 1 / scale
        integers = torch.where(largest > 0, part * factor, 0).round().clamp(-127, 127)
        groups.append((integers.double(), scale.double().expand(part.shape)))
    return tuple(torch.cat(side, 1) for side in zip(*groups, strict=True))


def check(x, weight, bias=None, is_int8=False, out_dtype=None):
    """Against float64, with the error that the sums' and the result's rounding allow."""
    out_dtype = out_dtype or x.dtype
    out = run(x, weight, bias, is_int8, out_dtype)
    assert out.dtype == out_dtype and out.shape == (len(x), len(weight)) and out.is_contiguous()
    exact_x, exact_weight = x.double(), weight.double()
    if is_int8:
        x8, x_scales = rounded(x)
        w8, w_scales = rounded(weight, torch.float16)
        exact_x, exact_weight = x8 * x_scales, w8 * w_scales
    expected = torch.einsum("rk,nk->rn", exact_x, exact_weight) + (0 if bias is None else bias.double())
    size = exact_x.abs() @ exact_weight.abs().T + expected.abs()
    allowed = size * 2**-24 * (8 + x.shape[1] ** 0.5) + 1.01 * EPSILON[out_dtype] * expected.abs()
    assert_close(out.double(), expected, atol=allowed)


# ==== values ====


@pytest.mark.parametrize(
    "rows, outputs, inputs", [(1, 1, 1), (3, 65, 100), (17, 130, 257), (130, 33, 64), (2, 9, 2081)]
)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_against_float64(dtype, rows, outputs, inputs):
    is_int8 = dtype == torch.int8
    x, weight, bias = make(rows, outputs, inputs, torch.float32 if is_int8 else dtype)
    check(x, weight, bias if outputs % 2 else None, is_int8)


@pytest.mark.parametrize("seed", range(6))
def test_random_shapes(seed):
    generator = torch.Generator().manual_seed(seed)
    rows, outputs, inputs = (int(torch.randint(1, most, (1,), generator=generator)) for most in (40, 140, 300))
    dtype = list(EPSILON)[seed % 3]
    x, weight, bias = make(rows, outputs, inputs, dtype, seed)
    check(x, weight, bias, out_dtype=list(EPSILON)[seed // 2])
    check(x, weight.float(), bias, is_int8=True, out_dtype=list(EPSILON)[seed // 2])


@pytest.mark.parametrize("splits", [1, 2, 3])
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_integers_are_exact(dtype, splits, monkeypatch):
    """Each product is seen once: any number of splits and rows of a launch, and no rounding to hide behind."""
    monkeypatch.setattr(kernels, "MOST_SPLITS", splits)
    monkeypatch.setattr(kernels, "MOST_ROWS", 32)
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randint(-9, 10, (n, 517), generator=generator) for n in (37, 70))
    bias = torch.arange(70.0)
    is_int8 = dtype == torch.int8
    if is_int8:  # every group has the scale 1
        x[:, ::32], weight[:, ::32] = 127, -127
    expected = (x[:, None] * weight).sum(2) + bias.long()
    x = x.to(torch.float32 if is_int8 else dtype)
    assert torch.equal(run(x, weight.float(), bias, is_int8, torch.float32), expected.float())


def test_the_tickets_of_splits_are_back_for_the_next_call():
    x, weight, bias = make(70, 130, 300)
    found = [run(x, weight, bias, is_int8) for is_int8 in (False, True, False)]
    assert torch.equal(found[0], found[2])
    (tickets,) = kernels._tickets.values()
    assert not tickets.any()
    blocks = max(
        triton.cdiv(kernels.MOST_ROWS, tile["ROWS"]) * triton.cdiv(kernels.IN_FLIGHT // 2, tile["OUTPUTS"])
        for tile in (kernels.tile_of(dtype, kernels.MOST_ROWS) for dtype in (*EPSILON, torch.uint8))
    )
    assert len(tickets) >= blocks


def test_int8_rounds_ties_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
    weight = torch.eye(8)  # 127 with the scale 1 / 127 in fp16
    scale = (torch.ones(1) / 127).half().float()
    expected = torch.tensor([[127.0, 0, 2, 2, 0, -2, -2, 126]])
    assert torch.equal(run(x, weight, is_int8=True), expected * 127 * scale)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_strided_rows_and_what_lies_beside_them(dtype):
    is_int8 = dtype == torch.int8
    x, weight, bias = make(5, 40, 75, torch.bfloat16 if is_int8 else dtype)
    store = torch.full((12, 99), torch.nan, dtype=x.dtype)
    view = store[1:11:2, 3:78]
    view.copy_(x)
    assert torch.equal(run(view, weight, bias, is_int8), run(x, weight, bias, is_int8))
    same = x[2:3].expand(4, -1)
    assert torch.equal(run(same, weight, bias, is_int8), run(x, weight, bias, is_int8)[[2] * 4])
    spaced = torch.stack((bias, bias), 1)[:, 0]
    assert torch.equal(run(x, weight, spaced, is_int8), run(x, weight, bias, is_int8))


def test_no_rows():
    assert run(torch.zeros(0, 70), torch.ones(3, 70)).shape == (0, 3)


# ==== the row rule ====


@pytest.mark.parametrize("x_dtype", EPSILON, ids=str)
@pytest.mark.parametrize("is_int8", [False, True])
def test_a_row_has_the_bits_that_it_has_alone(x_dtype, is_int8):
    x, weight, bias = make(130, 33, 140, x_dtype)
    alone = {t: run(x[t : t + 1], weight, bias, is_int8) for t in (0, 1, 16, 63, 64, 129)}
    for rows in (2, 8, 17, 130):
        out = run(x[:rows], weight, bias, is_int8)
        for t, row in alone.items():
            assert t >= rows or torch.equal(out[t : t + 1], row), (rows, t)
    assert torch.equal(run(x.flip(0), weight, bias, is_int8), out.flip(0))


def test_splits_depend_on_the_weight_alone():
    assert kernels.split(576, 1536, 64) == (24, 1)
    assert kernels.split(4096, 14336, 64) == (8, 28)
    assert kernels.split(128256, 4096, 64) == (1, 64)
    for outputs in range(512, 8193, 512):
        for inputs in (2048, 4096, 5000):
            tile = kernels.tile_of(torch.bfloat16, rows=1)
            splits, tiles = kernels.split(outputs, inputs, tile["INPUTS"])
            assert (splits - 1) * tiles * tile["INPUTS"] < inputs <= splits * tiles * tile["INPUTS"]
            assert 200 <= splits * -(-outputs // tile["OUTPUTS"]) <= 4 * 132  # multiprocessors


# ==== values that must not spread ====


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_what_is_not_finite_stays_in_its_row(dtype, bad):
    is_int8 = dtype == torch.int8
    x, weight, bias = make(6, 40, 150, torch.float32 if is_int8 else dtype)
    expected = run(x, weight, bias, is_int8)
    x[3, 140] = bad
    out = run(x, weight, bias, is_int8)
    if is_int8:
        assert out[3].isnan().all()
    else:
        assert not out[3].isfinite().any()
    others = [0, 1, 2, 4, 5]
    assert torch.equal(out[others], expected[others])


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_zeros_leave_the_bias(dtype):
    is_int8 = dtype == torch.int8
    x, weight, bias = make(3, 40, 150, torch.float32 if is_int8 else dtype)
    for a, b in ((x * 0, weight), (x, weight * 0)):
        assert torch.equal(run(a, b, bias, is_int8, torch.float32), bias.expand(3, -1))


@pytest.mark.parametrize("scale", [1e-42, 1e-37, 1e30], ids=str)
def test_extreme_sizes_in_int8(scale):
    x, weight, _ = make(3, 40, 96)
    out, plain = run(x * scale, weight, is_int8=True), run(x, weight, is_int8=True)
    assert out.isfinite().all()
    if scale > 1e-36:
        assert_close(out / scale, plain, atol=1e-4, rtol=1e-4)
    else:  # below the smallest factor's inverse values shrink, to nothing at last, and never grow
        assert (out.abs() <= scale * 96 * 127).all()


def test_large_values_overflow_only_in_the_result():
    x, weight = torch.full((2, 100), 2.0**15, dtype=torch.float16), torch.full((3, 100), 2.0**15, dtype=torch.float16)
    assert (run(x, weight, out_dtype=torch.float32) == 100 * 2.0**30).all()
    assert (run(x, weight) == torch.inf).all()
