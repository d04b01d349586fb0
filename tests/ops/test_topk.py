"""topk: every backend and instruction set against Python's sort of each bucket."""

import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyspec.ops import topk
from pyspec.ops.topk_recall import MOST_PER_BUCKET
from tests.helpers.every_backend import BACKENDS, each_backend, each_kernel, on_backend, same_bits

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ASSIGNMENTS = ["interleaved", "contiguous"]
INF, NAN = math.inf, math.nan
run, kernel = each_backend(topk), each_kernel(topk)


def members(n: int, buckets: int, assignment: str) -> list[list[int]]:
    """The indices of each bucket."""
    if assignment == "interleaved":
        return [list(range(first, n, buckets)) for first in range(buckets)]
    ends = [bucket * (n // buckets) + min(bucket, n % buckets) for bucket in range(buckets + 1)]
    return [list(range(*ends[bucket : bucket + 2])) for bucket in range(buckets)]


def oracle(row: list[float], k: int, kept: list[list[int]], per_bucket: int, largest: bool) -> list[int]:
    """Indices of the k best of what the buckets keep, best first."""

    def place(index: int):
        number = INF if math.isnan(row[index]) else row[index]
        order = (math.isnan(row[index]), number)
        return tuple(-term for term in order) + (index,) if largest else (*order, index)

    best = [index for bucket in kept for index in sorted(bucket, key=place)[:per_bucket]]
    return sorted(best, key=place)[:k]


def check(run, x: torch.Tensor, k: int, largest: bool = True, **knobs):
    """The set of indices without sorted, their order with it, and the values' bits, of x [rows, n]."""
    n = x.shape[1]
    buckets, per_bucket = knobs.get("buckets", 1), knobs.get("per_bucket", n)
    kept = members(n, buckets, knobs.get("assignment", "interleaved"))
    expected = [oracle(row, k, kept, per_bucket, largest) for row in x.tolist()]
    found = run(x, k, largest=largest, sorted=True, **knobs)
    assert found.indices.dtype == torch.int64 and found.values.dtype == x.dtype
    assert found.indices.tolist() == expected
    assert same_bits(found.values, x.gather(1, found.indices))
    found = run(x, k, largest=largest, **knobs)
    assert [sorted(row) for row in found.indices.tolist()] == [sorted(row) for row in expected]
    assert same_bits(found.values, x.gather(1, found.indices))


# ==== exact ====


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 100, 1000, 4099])
def test_exact(run, n, dtype):
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(n)).to(dtype)
    for k in sorted({1, min(8, n), n // 3 + 1, n}):
        check(run, x, k)
        check(run, x, k, largest=False)


@pytest.mark.parametrize("shape", [(1, 70_000), (2, 40_001), (70, 300)], ids=str)
@pytest.mark.parametrize("k", [1, 64, 257])
def test_exact_equals_torch_on_distinct_values(run, shape, k):
    rows, n = shape
    generator = torch.Generator().manual_seed(k)
    x = torch.stack([torch.randperm(n, generator=generator) for _ in range(rows)]).float() - n // 2
    for largest in (True, False):
        ours, theirs = run(x, k, largest=largest, sorted=True), torch.topk(x, k, largest=largest)
        assert torch.equal(ours.values, theirs.values) and torch.equal(ours.indices, theirs.indices)
        assert torch.equal(run(x, k, largest=largest).indices.sort().values, theirs.indices.sort().values)


def ordered_rows(n: int) -> torch.Tensor:
    """Rows whose order is worst for a bound that is guessed from a part of the row."""
    places = torch.arange(n)
    rows = [places, -places, places // 64, places % 16, places % 17, (places % 64 == 5) * places, places * 0]
    rows += [torch.where(places < n // 2, places, -places), places % 1024 // 16 * n + places]
    return torch.stack([row.float() for row in rows])


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("n, k", [(3000, 64), (3000, 700), (20_000, 33)])
def test_exact_on_ordered_rows(run, n, k, largest):
    check(run, ordered_rows(n), k, largest)


# ==== buckets ====


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
@pytest.mark.parametrize("per_bucket", range(1, MOST_PER_BUCKET + 1))
@pytest.mark.parametrize("n, k, buckets", [(1000, 8, 20), (1000, 30, 30), (999, 16, 16), (4099, 40, 64), (70, 5, 7)])
def test_buckets(run, n, k, buckets, per_bucket, assignment):
    generator = torch.Generator().manual_seed(n)
    for dtype in DTYPES:
        x = (2 * torch.randn(2, n, generator=generator)).to(dtype)  # 16-bit rows have equals
        for largest in (True, False):
            check(run, x, k, largest, buckets=buckets, per_bucket=per_bucket, assignment=assignment)


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
@pytest.mark.parametrize("n, k, buckets, per_bucket", [(70_000, 100, 128, 2), (70_003, 64, 32, 2), (50_000, 9, 9, 1)])
def test_buckets_of_long_rows(run, n, k, buckets, per_bucket, assignment):
    x = torch.randn(2, n, generator=torch.Generator().manual_seed(n))
    check(run, x, k, buckets=buckets, per_bucket=per_bucket, assignment=assignment)
    check(run, x[:1].half(), k, largest=False, buckets=buckets, per_bucket=per_bucket, assignment=assignment)


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
@pytest.mark.parametrize("buckets, per_bucket", [(16, 4), (64, 2), (24, 3)])
def test_buckets_of_ordered_rows(run, buckets, per_bucket, assignment):
    for largest in (True, False):
        check(run, ordered_rows(3001), 48, largest, buckets=buckets, per_bucket=per_bucket, assignment=assignment)


@pytest.mark.parametrize("n, k, buckets, per_bucket", [(5, 3, 100, 1), (20, 20, 10, 2), (21, 20, 10, 2), (7, 7, 4, 2)])
def test_buckets_larger_than_the_row(run, n, k, buckets, per_bucket):
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(n))
    for assignment in ASSIGNMENTS:
        check(run, x, k, buckets=buckets, per_bucket=per_bucket, assignment=assignment)


def test_an_ideal_distribution_is_found_whole(run):
    n, buckets = 17, 4  # the larger bucket holds one of the best too
    x = torch.zeros(1, n)
    x[0, [0, 1, 2, 3]] = torch.tensor([1.0, 4.0, 2.0, 3.0])
    assert run(x, 4, buckets=buckets, per_bucket=1, sorted=True).indices.tolist() == [[1, 3, 2, 0]]
    assert run(x, 4, buckets=buckets, per_bucket=1, assignment="contiguous").values.sum() < 10


def test_knobs_that_are_left_out(run):
    x = torch.randn(2, 500, generator=torch.Generator().manual_seed(0))
    for some, all_knobs in (
        ({"per_bucket": 2}, {"buckets": 11, "per_bucket": 2}),
        ({"buckets": 20}, {"buckets": 20, "per_bucket": 2}),
        ({"buckets": 30}, {"buckets": 30, "per_bucket": 1}),
    ):
        assert torch.equal(run(x, 21, **some, sorted=True).indices, run(x, 21, **all_knobs, sorted=True).indices)


# ==== special values ====


def special_rows(n: int) -> torch.Tensor:
    rows = torch.zeros(12, n)
    rows[0] = -INF
    rows[1], rows[1, -3] = -INF, 1.0
    rows[2], rows[2, ::80] = -INF, -torch.arange(len(rows[2, ::80]), dtype=torch.float32)
    rows[3] = NAN
    rows[4, [3, -1]] = torch.tensor([NAN, -NAN])
    rows[5] = torch.arange(n)
    rows[5, ::7] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)  # NaN with all its bits set
    rows[6, [1, -1]] = INF
    rows[7], rows[7, 9], rows[7, -1] = INF, -INF, NAN
    rows[8, ::2] = -0.0
    rows[9, 1::2], rows[9, 5] = -0.0, -1.0
    rows[10, :40], rows[10, 40:] = NAN, -INF
    rows[11] = torch.where(torch.arange(n) % 3 == 0, INF, -INF)
    return rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("n", [50, 70, 2000])
def test_special_values(run, n, largest, dtype):
    x = special_rows(n).to(dtype)
    for k in (1, 5, 33, n):
        check(run, x, k, largest)
    for assignment in ASSIGNMENTS:
        for buckets, per_bucket in ((33, 1), (20, 2), (11, 3), (16, 4)):
            check(run, x, 33, largest, buckets=buckets, per_bucket=per_bucket, assignment=assignment)


def test_nan_ranks_as_in_torch(run):
    x = torch.tensor([[1.0, NAN, INF, -INF, 3.0]])
    for largest in (True, False):
        assert torch.equal(run(x, 5, largest=largest, sorted=True).indices, torch.topk(x, 5, largest=largest).indices)


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(st.data())
def test_any_rows(data):
    value = st.one_of(st.integers(-3, 3).map(float), st.floats(width=32), st.just(-INF))
    n = data.draw(st.integers(1, 150))
    x = torch.tensor(data.draw(st.lists(st.lists(value, min_size=n, max_size=n), min_size=1, max_size=2)))
    k = data.draw(st.integers(1, n))
    backend, largest = data.draw(st.sampled_from(BACKENDS)), data.draw(st.booleans())
    knobs = {}
    if data.draw(st.booleans()):
        per_bucket = data.draw(st.integers(1, MOST_PER_BUCKET))
        buckets = data.draw(st.integers(-(-k // per_bucket), n + 20))
        knobs = dict(buckets=buckets, per_bucket=per_bucket, assignment=data.draw(st.sampled_from(ASSIGNMENTS)))
    with on_backend(backend):
        check(topk, x, k, largest, **knobs)


# ==== shapes ====


@pytest.mark.parametrize("knobs", [{}, {"buckets": 16, "per_bucket": 2}], ids=["exact", "buckets"])
@pytest.mark.parametrize("dim", [-1, 0, 1, 2, -3])
def test_any_dimension_and_strides(run, dim, knobs):
    memory = torch.randn(50, 48, 64, generator=torch.Generator().manual_seed(0))
    for x in (memory, memory.transpose(0, 2), memory[3:, ::2, 5:], memory.expand(50, 48, 64)[:, :, ::2]):
        x = x.narrow((dim + 1) % 3, 0, 3)
        if x.shape[dim] < 24:
            continue
        found = run(x, 20, dim, sorted=True, **knobs)
        assert found.values.shape == found.indices.shape == torch.topk(x, 20, dim).values.shape
        rows = x.movedim(dim, -1).reshape(-1, x.shape[dim]).contiguous()
        alone = run(rows, 20, sorted=True, **knobs)
        assert torch.equal(found.indices.movedim(dim, -1).reshape(-1, 20), alone.indices)
        assert torch.equal(found.values, x.gather(dim, found.indices))


def test_one_dimension_empty_batches_and_expanded_rows(run):
    assert run(torch.tensor([1.0, 3.0, 2.0]), 2, sorted=True).indices.tolist() == [1, 2]
    for shape in ((0, 5), (3, 0, 5), (0, 0, 7)):
        found = run(torch.zeros(shape), 4)
        assert found.values.shape == found.indices.shape == (*shape[:-1], 4) and found.indices.dtype == torch.int64
    assert run(torch.zeros(5, 0), 4, 0).values.shape == (4, 0)
    x = torch.randn(1, 300, generator=torch.Generator().manual_seed(0)).expand(4, 300)
    check(run, x, 10, buckets=16, per_bucket=1)
    check(run, torch.randn(4, 1).expand(4, 40), 10)


def test_a_row_has_the_same_result_in_any_company_on_any_threads(kernel):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 3000, (70, 9000), generator=generator).float()
    threads = torch.get_num_threads()
    for knobs in ({}, {"buckets": 64, "per_bucket": 2}, {"buckets": 256, "per_bucket": 4}):
        together = kernel(x, 100, **knobs).indices
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            try:
                for row in (0, 33, 69):
                    assert torch.equal(
                        kernel(x[row], 100, sorted=True, **knobs).indices.sort().values, together[row].sort().values
                    )
                assert torch.equal(kernel(x, 100, **knobs).indices, together)
            finally:
                torch.set_num_threads(threads)


# ==== memory ====

KERNELS = Path(__file__).parents[2] / "kernels"
FLAGS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq".split(),
}


@pytest.mark.skipif(not KERNELS.exists(), reason="the kernels' sources are not here")
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
@pytest.mark.parametrize("sanitizer", [[], ["-fsanitize=address"]], ids=["guard_bytes", "address_sanitizer"])
def test_nothing_outside_of_the_arguments_is_touched(tmp_path, sanitizer):
    empty, program = tmp_path / "empty.cpp", tmp_path / "driver"
    empty.write_text("int main() {}")
    if subprocess.run(["g++", *sanitizer, empty, "-o", program], capture_output=True).returncode:
        pytest.skip("g++ has no AddressSanitizer")
    best = [name for name in FLAGS if name in BACKENDS][-1:]
    for name in ["portable"] if not sanitizer else best:
        sources = [KERNELS / "cpu" / "topk.cpp", Path(__file__).parent / "topk_driver.cpp"]
        options = ["-std=c++17", "-O1", f"-I{KERNELS}", f"-DPYSPEC_ISA={name}", f"-DPYSPEC_ISA_{name}=1", *FLAGS[name]]
        subprocess.run(["g++", *options, *sanitizer, *sources, "-o", program], check=True, capture_output=True)
        ran = subprocess.run([program], capture_output=True, text=True)
        assert ran.returncode == 0 and "checks passed" in ran.stdout, ran.stdout + ran.stderr


# ==== torch ====


@pytest.mark.parametrize("knobs", [(0, 1), (8, 2)], ids=["exact", "buckets"])
def test_opcheck(knobs):
    torch.library.opcheck(torch.ops.pyspec.topk.default, (torch.randn(3, 50), 10, *knobs, True, True, False))


@pytest.mark.parametrize("knobs", [{}, {"buckets": 8, "per_bucket": 2}], ids=["exact", "buckets"])
def test_compile(knobs):
    x = torch.randn(3, 50, 4)
    compiled = torch.compile(lambda x: topk(x, 10, 1, sorted=True, **knobs), fullgraph=True)
    for ours, theirs in zip(compiled(x), topk(x, 10, 1, sorted=True, **knobs), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "error, match, x, k, options",
    [
        (ValueError, r"k must be in \[1, 5\].*got 0", torch.zeros(2, 5), 0, {}),
        (ValueError, r"k must be in \[1, 5\].*got 6", torch.zeros(2, 5), 6, {}),
        (ValueError, r"k must be in \[1, 2\].*dimension 0, got 3", torch.zeros(2, 5), 3, {"dim": 0}),
        (ValueError, r"k must be in \[1, 0\].*got 1", torch.zeros(2, 0), 1, {}),
        (TypeError, "k must be an int, got 1.5", torch.zeros(2, 5), 1.5, {}),
        (TypeError, "k must be an int, got True", torch.zeros(2, 5), True, {}),
        (ValueError, "x must be float32.*complex64", torch.zeros(2, 5, dtype=torch.complex64), 1, {}),
        (ValueError, "x must be float32.*bool", torch.zeros(2, 5, dtype=torch.bool), 1, {}),
        (ValueError, "x must be float32.*int64", torch.zeros(2, 5, dtype=torch.int64), 1, {}),
        (ValueError, "x must be float32.*float64", torch.zeros(2, 5).double(), 1, {}),
        (ValueError, "x must have at least one dimension", torch.tensor(1.0), 1, {}),
        (ValueError, r"dim must be in \[-2, 1\], got 2", torch.zeros(2, 5), 1, {"dim": 2}),
        (ValueError, r"dim must be in \[-2, 1\], got -3", torch.zeros(2, 5), 1, {"dim": -3}),
        (ValueError, r"x must have less than 2\^31 values", torch.zeros(1).expand(2**31), 1, {}),
        (ValueError, r"per_bucket must be in \[1, 4\], got 5", torch.zeros(2, 5), 1, {"per_bucket": 5}),
        (ValueError, r"per_bucket must be in \[1, 4\], got 0", torch.zeros(2, 5), 1, {"per_bucket": 0}),
        (TypeError, "per_bucket must be an int, got 2.0", torch.zeros(2, 5), 1, {"per_bucket": 2.0}),
        (ValueError, r"buckets must be in \[1, 2\^31\), got 0", torch.zeros(2, 5), 1, {"buckets": 0}),
        (ValueError, "buckets must keep at least k = 5 values, got 1 buckets", torch.zeros(2, 5), 5, {"buckets": 1}),
        (
            ValueError,
            "buckets must keep at least k = 5 values, got 2 buckets that keep 2",
            torch.zeros(2, 9),
            5,
            {"buckets": 2, "per_bucket": 2},
        ),
        (
            ValueError,
            "assignment must be 'interleaved' or 'contig.*'blocks'",
            torch.zeros(5),
            1,
            {"assignment": "blocks"},
        ),
    ],
)
def test_bad_input_names_the_argument(error, match, x, k, options):
    with pytest.raises(error, match=f"^{match}"):
        topk(x, k, **options)
