"""The dot that conftest.py puts in place of the interpreter's: right, in one order, and the same for every row."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed for this platform")
import triton.language as tl  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("kernel_device"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has a dot of its own"),
]


@triton.jit
def dot_kernel(a, b, sums, BATCH: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """sums [BATCH, M, N] += a [BATCH, M, K] @ b [BATCH, N, K] transposed."""
    batch, m = tl.arange(0, BATCH)[:, None, None], tl.arange(0, M)[None, :, None]
    k, places = tl.arange(0, K)[None, None, :], tl.arange(0, N)[None, None, :]
    left = tl.load(a + (batch * M + m) * K + k)
    right = tl.load(b + (batch * N + tl.arange(0, N)[None, :, None]) * K + k)
    places = (batch * M + m) * N + places
    right = tl.permute(right, (0, 2, 1))
    total = tl.dot(left, right, tl.load(sums + places), input_precision="ieee", out_dtype=sums.dtype.element_ty)
    tl.store(sums + places, total)


def dot(a, b, sums=None):
    """a [..., M, K] @ b [..., N, K] transposed, added to sums: integers in int32, other numbers in fp32."""
    dtype = torch.float32 if a.is_floating_point() else torch.int32
    shape = (*a.shape[:-1], b.shape[-2])
    out = torch.zeros(shape, dtype=dtype) if sums is None else sums.clone()
    batch = a.shape[0] if a.dim() == 3 else 1
    dot_kernel[(1,)](a.contiguous(), b.contiguous(), out, batch, *shape[-2:], a.shape[-1])
    return out


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("batch", [1, 4])
def test_it_is_the_product(batch, dtype):
    a, b = ((random(batch, n, 32, seed=n) * 9).to(dtype) for n in (16, 64))
    sums = dot(a, b, dot(a, b))
    expected = 2 * (a.double() @ b.double().transpose(1, 2))
    torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=0 if dtype == torch.int8 else 1e-3)


@pytest.mark.parametrize(
    "places, expected",
    [((0, 1, 2), 0.0), ((0, 30, 31), 0.0), ((0, 31, 1), 1.0), ((31, 0, 15), 0.0), ((15, 31, 0), 1.0)],
)
def test_products_are_added_in_ascending_order(places, expected):
    """2^25 + 1 is 2^25 in fp32, so what is left of 2^25, 1 and -2^25 tells their order."""
    a = torch.zeros(16, 32)
    a[:, list(places)] = torch.tensor([2.0**25, 1.0, -(2.0**25)])
    for rows, columns in ((16, 16), (16, 64), (64, 32)):
        assert (dot(a[:1].expand(rows, -1), torch.ones(columns, 32)) == expected).all()


def test_a_row_has_the_bits_that_it_has_in_any_company():
    a, b = random(64, 64), random(64, 64, seed=1)
    together = dot(a, b)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dot(a[order], b), together[order])
    assert torch.equal(dot(a, b[order]), together[:, order])
    for row in (0, 17, 63):
        assert torch.equal(dot(a[row].expand(16, -1), b), together[row].expand(16, -1))
        others = torch.full_like(a, torch.nan)
        others[row] = a[row]
        assert torch.equal(dot(others, b)[row], together[row])
