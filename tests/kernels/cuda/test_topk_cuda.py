"""The CUDA kernel of topk against the plain-PyTorch reference: on a GPU where there is one, else on the CPU through
tests/cuda_on_host, behind its own binding either way."""

import ctypes
import random
from pathlib import Path

import pytest
import torch

from pyspec.ops.topk import _OP, topk_reference
from tests.helpers.cuda_on_host import ROOT, HostLibrary, build_on_host, fenced_memory, op_on_host
from tests.helpers.on_gpu import to_device
from tests.helpers.slow import slow

HAS_GPU = torch.cuda.is_available()
INF, NAN = torch.inf, torch.nan
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


@pytest.fixture(scope="module")
def kernel():
    if not HAS_GPU:
        return op_on_host("topk")[0]
    assert _OP.backend_for("cuda")[0] == "cuda", _OP.backend_for("cuda")[1]
    return lambda x, *rest: tuple(out.cpu() for out in _OP.overload(to_device(x, "cuda"), *rest))


@pytest.fixture
def device():
    """Sets the host's device for a test; a GPU is as it is."""
    library = None if HAS_GPU else op_on_host("topk")[1]
    yield lambda **settings: library.set(**settings) if library else None
    if library:
        library.set()


def equal_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(BITS[a.dtype]), b.view(BITS[b.dtype]))


def check(kernel, x, k, buckets=0, per_bucket=1, interleaved=True, largest=True):
    """In order where it is asked for; else the same set, again in the same order."""
    arguments = (x, k, buckets, per_bucket, interleaved, largest)
    values, indices = kernel(*arguments, True)
    expected_values, expected_indices = topk_reference(*arguments, True)
    assert indices.dtype == torch.int64 and torch.equal(indices, expected_indices)
    assert equal_bits(values, expected_values)
    values, indices = kernel(*arguments, False)
    assert torch.equal(indices.sort().values, expected_indices.sort().values)
    assert equal_bits(values, x.gather(1, indices))
    assert torch.equal(kernel(*arguments, False)[1], indices)


def random_row(rng: random.Random, rows: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal, of few different values, or sprinkled with all that is special; some with a row stride of their own."""
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    memory = torch.full((rows, n + rng.choice([0, 0, 7])), NAN)  # nobody may look at what is between rows
    x = memory[:, :n]
    x.normal_(generator=generator)
    kind = rng.choice(["normal", "few", "special"])
    if kind == "few":
        x.mul_(2).round_()
    if kind == "special":
        special = torch.tensor([INF, -INF, NAN, 0.0, -0.0, 1.0, 65504.0, 1e-7])
        places = torch.rand(rows, n, generator=generator) < rng.choice([0.05, 0.9])
        picks = special[torch.randint(len(special), (rows, n), generator=generator)]
        x.copy_(torch.where(places, picks, x))
    return memory.to(dtype)[:, :n]


@pytest.mark.parametrize("seed", range(60))
def test_random_shapes(kernel, device, seed):
    rng = random.Random(seed)
    device(seed=seed)  # of the order in which threads run
    rows, n = rng.randint(1, 4), int(10 ** rng.uniform(0, 3.6))
    k = rng.choice([1, n, rng.randint(1, n), rng.randint(1, min(n, 40))])
    per_bucket = rng.randint(1, 4)
    fewest = -(-k // per_bucket)
    buckets = rng.choice([0, fewest, fewest + rng.randint(0, 3 * fewest + 5)])
    x = random_row(rng, rows, n, rng.choice(DTYPES))
    check(kernel, x, k, buckets, per_bucket, rng.random() < 0.5, rng.random() < 0.5)


@pytest.mark.parametrize("seed", range(8))
def test_several_blocks_share_a_long_row(kernel, device, seed):
    rng = random.Random(seed)
    device(multiprocessors=rng.choice([4, 9]), blocks_in_flight=rng.choice([1, 3]), seed=seed)
    rows, n = rng.randint(1, 2), rng.randint(2 * 8192, 60000)
    k, per_bucket = rng.choice([1, 50, 700]), rng.randint(1, 4)
    buckets = rng.choice([0, -(-k // per_bucket), 2 * k])
    x = random_row(rng, rows, n, rng.choice(DTYPES))
    check(kernel, x, k, buckets, per_bucket, rng.random() < 0.7, rng.random() < 0.7)


@pytest.mark.parametrize(
    "n, k, buckets, per_bucket", [(9000, 3000, 3000, 2), (40000, 2100, 2100, 4), (9000, 7000, 0, 1)]
)
def test_more_than_shared_memory_holds(kernel, device, n, k, buckets, per_bucket):
    device(multiprocessors=2)
    check(kernel, torch.randn(1, n, generator=torch.Generator().manual_seed(n)).half(), k, buckets, per_bucket)


@pytest.mark.parametrize("dtype", [torch.float32, slow(torch.float16), slow(torch.bfloat16)], ids=str)
def test_adversarial_rows(kernel, dtype):
    n = 2500
    places = torch.arange(n)
    rows = [torch.full((n,), value) for value in (0.0, -INF, INF, NAN)]
    rows += [places.float(), -places.float(), (places % 7).float(), torch.where(places % 2 == 0, 0.0, -0.0)]
    rows += [torch.where(places % 64 == 3, places.float(), -INF)]  # all that is good in one bucket
    rows += [torch.where(places < 30, -1.0, -INF), torch.where(places >= n - 30, NAN, -INF)]
    rows += [1 + places * 2.0**-23]  # float32: neighbours in the last bits
    x = torch.stack(rows).to(dtype)
    negative_nan = torch.tensor([-1], dtype=BITS[dtype]).view(dtype)
    x[3, 1000:] = negative_nan
    for k, buckets, per_bucket in [(1, 0, 1), (64, 0, 1), (n, 0, 1), (64, 64, 1), (64, 32, 4), (100, 50, 2), (4, 1, 4)]:
        for largest in (True, False):
            check(kernel, x, k, buckets, per_bucket, largest=largest)
    check(kernel, x, 64, 64, 2, interleaved=False)


@pytest.mark.parametrize("buckets", [0, 300])
def test_the_slices_of_a_row_do_not_show(kernel, device, buckets):
    """Nor does the company of a row, which decides their number, nor in which order threads and blocks run."""
    x = torch.randn(3, 50000, generator=torch.Generator().manual_seed(0)).bfloat16()
    arguments = (200, buckets, 2, True, True, False)
    device(multiprocessors=1)
    expected = kernel(x, *arguments)
    for settings in [{"multiprocessors": 12}, {"multiprocessors": 12, "blocks_in_flight": 3, "seed": 5}, {"seed": 6}]:
        device(**settings)
        for rows in (slice(0, 3), slice(1, 2)):
            found = kernel(x[rows], *arguments)
            assert torch.equal(found[1], expected[1][rows]) and equal_bits(found[0], expected[0][rows])


def test_no_rows_and_one_value(kernel):
    values, indices = kernel(torch.zeros(0, 5), 2, 0, 1, True, True, False)
    assert values.shape == indices.shape == (0, 2)
    check(kernel, torch.full((3, 1), NAN), 1)
    check(kernel, torch.zeros(5, 3).T[:, :1], 1)


@pytest.mark.parametrize("k", [slow(1), slow(200), 256, slow(257)])
def test_exact_rows_that_mislead_the_lower_bound(kernel, device, k):
    """The best values all in one thread's share, or in few; more equals than a thread has places for."""
    device(seed=k)
    places = torch.arange(9000)
    rows = [places.float(), torch.where(places % 1024 == 3, places.float(), -1.0)]
    rows += [torch.where(places % 1024 < 40, places.float(), -INF), (places < 5000).float(), -(places % 3).float()]
    rows += [torch.where(places % 2 == 0, -0.0, 0.0), torch.where(places > 8000, NAN, places.float())]
    rows += [torch.where(places % 5 == 0, NAN, INF), torch.where(places > 8000, INF, places.float())]
    for dtype in DTYPES:
        for largest in (True, False):
            check(kernel, torch.stack(rows).to(dtype), k, largest=largest)


@pytest.mark.parametrize("dtype", [torch.float16, slow(torch.float32), slow(torch.bfloat16)], ids=str)
def test_slices_that_find_too_much(kernel, device, dtype):
    """More that reaches a slice's bound than it hands on, or than it has room for; rows that begin anywhere."""
    device(multiprocessors=12, seed=1)
    places = torch.arange(20001)
    rows = [places.float(), -places.float(), (places % 3).float(), torch.where(places > 19990, NAN, 0.0)]
    rows += [torch.where(places % 7 == 0, 2.0, torch.where(places < 900, 1.0, 0.0))]
    x = torch.stack(rows).to(dtype)
    for largest in (True, False):
        check(kernel, x[:, 1:], 100, largest=largest)
        check(kernel, x[2:3], 256, largest=largest)


def test_order_without_sorting(kernel):
    """Exact: of the few best, best first, else ascending indices. Buckets: theirs, which is ascending too where each
    keeps one of neighbours."""
    x = torch.randn(2, 9000, generator=torch.Generator().manual_seed(0))
    for k, buckets, interleaved in [(300, 0, True), (100, 100, False)]:
        _, indices = kernel(x, k, buckets, 1, interleaved, True, False)
        assert torch.equal(indices, indices.sort().values)
    for k, buckets in [(256, 0), (100, 200)]:
        plain, best_first = (kernel(x, k, buckets, 1, True, True, is_sorted)[1] for is_sorted in (False, True))
        assert torch.equal(plain, best_first)


@pytest.mark.parametrize(
    "x, arguments, text",
    [
        (torch.zeros(2, 4, dtype=torch.float64), (1, 0, 1), "x must be float32, float16 or bfloat16"),
        (torch.zeros(4), (1, 0, 1), "x must be"),
        (torch.zeros(4, 4).T, (1, 0, 1), "contiguous last dimension"),
        (torch.zeros(2, 4), (0, 0, 1), "k must be in"),
        (torch.zeros(2, 4), (5, 0, 1), "k must be in"),
        (torch.zeros(2, 4), (2, 2, 5), "per_bucket must be in"),
        (torch.zeros(2, 4), (3, 1, 2), "buckets must be 0 or hold at least k"),
        (torch.zeros(2, 4), (3, -1, 2), "buckets must be 0 or hold at least k"),
    ],
)
def test_bad_input_of_a_direct_caller(kernel, x, arguments, text):
    with pytest.raises(RuntimeError, match=text):
        kernel(x, *arguments, True, True, False)


@pytest.mark.skipif(HAS_GPU, reason="the CPU's memory is watched")
@pytest.mark.parametrize(
    "rows, n, k, buckets, per_bucket",
    [(3, 700, 50, 0, 1), (3, 701, 50, 25, 2), (2, 9001, 3000, 3000, 2), (1, 40000, 100, 0, 1), (1, 40000, 99, 70, 3)],
)
@pytest.mark.parametrize("sorted", [False, True])
def test_nothing_outside_is_touched(rows, n, k, buckets, per_bucket, sorted):
    sources = [ROOT / "kernels/cuda/topk.cu", Path(__file__).parent / "topk_into.cpp"]
    library = HostLibrary(build_on_host(*sources))
    library.topk_workspace.restype = ctypes.c_int64
    shape = [ctypes.c_int64(size) for size in (rows, n, k, buckets, per_bucket)] + [ctypes.c_bool(sorted)]
    sizes = (4 * rows * n, 4 * rows * k, 8 * rows * k, library.topk_workspace(*shape))
    memory, before = zip(*map(fenced_memory, sizes), strict=True)
    x = memory[0].view(torch.float32).view(rows, n).normal_(generator=torch.Generator().manual_seed(n))
    library.call("topk_into", *(ctypes.c_void_p(part.data_ptr()) for part in memory), *shape)
    assert all((part == 0xA7).all() for part in before)
    indices = memory[2].view(torch.int64).view(rows, k)
    expected = topk_reference(x, k, buckets, per_bucket, True, True, True)[1]
    assert torch.equal(indices.sort().values, expected.sort().values)
