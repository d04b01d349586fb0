"""What topk promises about recall: the formula against enumeration and the op, and the choice that relies on it."""

import itertools
import json
import math

import pytest
import torch

from pyspec.machine import store
from pyspec.ops import choose_buckets, expected_recall, topk, topk_recall
from pyspec.ops.topk_recall import EXACT, KEPT, SIZES, Buckets, fewest_buckets

ROWS = 200
PROMISES = (0.5, 0.9, 0.99, 0.999)


@pytest.fixture(autouse=True)
def own_cache_folder(monkeypatch, tmp_path):
    """What is measured here is kept here."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    topk_recall._choose.cache_clear()
    topk_recall._costs.cache_clear()
    yield
    topk_recall._choose.cache_clear()
    topk_recall._costs.cache_clear()


# ==== theory ====


@pytest.mark.parametrize("n, k, buckets", [(8, 3, 2), (9, 4, 4), (10, 4, 3), (7, 7, 3), (11, 2, 5), (6, 4, 8)])
@pytest.mark.parametrize("per_bucket", [1, 2, 3])
def test_expected_recall_is_the_mean_over_all_places_of_the_best(n, k, buckets, per_bucket):
    found = 0
    for best in itertools.combinations(range(n), k):
        in_buckets = [sum(place % buckets == bucket for place in best) for bucket in range(buckets)]
        found += sum(min(count, per_bucket) for count in in_buckets)
    assert expected_recall(n, k, buckets, per_bucket) == pytest.approx(found / k / math.comb(n, k), rel=1e-9)


def test_expected_recall_of_the_literature():
    # Theorem 1 of arXiv 2506.04165 for n = 131072, k = 256: (per_bucket, buckets per k / per_bucket)
    for (per_bucket, factor), recall in {
        (1, 1): 0.633,
        (1, 4): 0.886,
        (2, 2): 0.897,
        (2, 8): 0.991,
        (4, 4): 0.9958,
    }.items():
        assert expected_recall(131072, 256, 256 * factor // per_bucket, per_bucket) == pytest.approx(recall, abs=6e-4)
    poisson = 1 - math.exp(-2) * 2**2 / 2
    assert expected_recall(10**9, 10**5, 10**5 // 2, 2) == pytest.approx(poisson, abs=1e-4)


def test_expected_recall_where_nothing_can_be_lost():
    for arguments in ((10, 3, 10, 1), (10, 3, 3, 4), (1000, 1, 4, 1), (1000, 4, 2, 4), (5, 5, 100, 1)):
        assert expected_recall(*arguments) == pytest.approx(1.0, abs=1e-12) and expected_recall(*arguments) <= 1


# ==== measured ====


def rows_of(kind: str, n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    noise = torch.randn(ROWS, n, generator=generator)
    if kind == "uniform":
        return torch.rand(ROWS, n, generator=generator)
    if kind == "log-normal":
        return (2 * noise).exp()
    # a hill somewhere in the row, as attention has: the best are neighbours
    centre = torch.rand(ROWS, 1, generator=generator) * n
    distance = (torch.arange(n) - centre).abs() / n
    return noise * 0.1 - 40 * distance


def recalls(x: torch.Tensor, k: int, **knobs) -> torch.Tensor:
    """[ROWS] shares of the k best that are found; by value, so that ties are no misses."""
    least = x.topk(k).values[:, -1:]
    return (topk(x, k, **knobs).values >= least).float().mean(1)


def standard_error(shares: torch.Tensor, expected: float, k: int) -> float:
    """Of the mean; where no row lost anything, what independent losses would give."""
    return max(shares.std().item(), math.sqrt(expected * (1 - expected) / k), 1e-7) / math.sqrt(ROWS)


@pytest.mark.parametrize("kind", ["uniform", "log-normal"])
@pytest.mark.parametrize("n, k", [(1000, 16), (4096, 64), (5001, 100), (16384, 256)])
def test_measured_recall_is_the_expected(n, k, kind):
    x = rows_of(kind, n)
    for per_bucket, factor in itertools.product((1, 2, 3, 4), (1, 2, 4, 8)):
        buckets = -(-k * factor // per_bucket)
        expected = expected_recall(n, k, buckets, per_bucket)
        for assignment in ("interleaved", "contiguous"):
            shares = recalls(x, k, buckets=buckets, per_bucket=per_bucket, assignment=assignment)
            assert abs(shares.mean() - expected) <= 4 * standard_error(shares, expected, k), (per_bucket, buckets)


@pytest.mark.parametrize("n, k", [(4096, 64), (16384, 256)])
def test_neighbours_that_are_alike_break_contiguous_buckets_only(n, k):
    x = rows_of("hill", n)
    for per_bucket, factor in itertools.product((1, 2, 4), (1, 4)):
        buckets = k * factor // per_bucket
        expected = expected_recall(n, k, buckets, per_bucket)
        shares = recalls(x, k, buckets=buckets, per_bucket=per_bucket)
        assert shares.mean() >= expected - 4 * standard_error(shares, expected, k)
        contiguous = recalls(x, k, buckets=buckets, per_bucket=per_bucket, assignment="contiguous")
        assert contiguous.mean() < 0.6 * expected


@pytest.mark.parametrize("recall", PROMISES)
@pytest.mark.parametrize("n, k", [(1000, 16), (4096, 64), (5001, 100), (16384, 256)])
def test_the_promise_is_kept(n, k, recall):
    x = rows_of("uniform", n)
    choices = [Buckets(fewest_buckets(n, k, recall, per_bucket), per_bucket) for per_bucket in (1, 2, 3, 4)]
    for knobs in [{"recall": recall}, *(choice._asdict() for choice in choices)]:
        shares = recalls(x, k, **knobs)
        assert shares.mean() >= recall - 4 * standard_error(shares, recall, k), knobs


# ==== choice ====


def test_the_fewest_buckets_are_the_fewest():
    for n, k, recall, per_bucket in itertools.product((1000, 5001, 65536), (3, 64, 200), PROMISES, (1, 2, 4)):
        buckets = fewest_buckets(n, k, recall, per_bucket)
        assert expected_recall(n, k, buckets, per_bucket) >= recall and buckets * per_bucket >= k
        fewer = [count for count in (-(-k // per_bucket), buckets - 16) if 0 < count < buckets]
        for count in fewer:
            assert count * per_bucket < k or expected_recall(n, k, count, per_bucket) < recall


def table(exact: float, stage: tuple[float, float, float, float]) -> list[list[list[float]]]:
    """Seconds that grow with the row, times a factor."""
    return [[[factor * n * 1e-9 for _ in KEPT] for n in SIZES["cpu"]] for factor in (exact, *stage)]


@pytest.mark.parametrize(
    "exact, stage, expected",
    [
        (1.0, (2.0, 2.0, 2.0, 2.0), 0),
        (1.0, (0.95, 2.0, 2.0, 2.0), 0),
        (10.0, (1.0, 2.0, 3.0, 4.0), 1),
        (10.0, (9.0, 2.0, 3.0, 4.0), 2),
    ],
)
def test_the_cheapest_is_chosen(monkeypatch, exact, stage, expected):
    monkeypatch.setattr(topk_recall, "_measure", lambda device: table(exact, stage))
    monkeypatch.setattr(
        topk_recall, "backends", lambda: [{"op": "topk", "device": "cpu", "backend": "x", "reason": ""}]
    )
    found = choose_buckets(65536, 64, 0.7)
    assert found == (Buckets(fewest_buckets(65536, 64, 0.7, expected), expected) if expected else EXACT)


def test_costs_lie_on_lines_between_and_beyond_what_was_measured():
    costs = topk_recall._Costs(SIZES["cpu"], table(3.0, (1.0, 1.0, 1.0, 1.0)))
    for n in (100, 4096, 9000, 262144, 10**7):
        assert costs.exact(n, 64) == pytest.approx(3e-9 * n)
        assert costs.bucketed(n, 64, 64, 1) == pytest.approx(1e-9 * n)
        assert costs.bucketed(n, 64, 64, 2) == pytest.approx(1e-9 * n + 3e-9 * 128)


def test_costs_are_measured_once_and_kept(monkeypatch):
    calls = []
    monkeypatch.setattr(topk_recall, "_measure", lambda device: calls.append(device) or table(10.0, (1.0,) * 4))
    monkeypatch.setattr(
        topk_recall, "backends", lambda: [{"op": "topk", "device": "cpu", "backend": "x", "reason": ""}]
    )
    first = choose_buckets(5000, 16, 0.9)
    topk_recall._choose.cache_clear(), topk_recall._costs.cache_clear()
    assert choose_buckets(5000, 16, 0.9) == first and calls == ["cpu"]
    (file,) = store.folder().glob("topk-*")
    store.keep("topk", json.loads(file.read_text())["key"], "damaged")
    topk_recall._choose.cache_clear(), topk_recall._costs.cache_clear()
    assert choose_buckets(5000, 16, 0.9) == first and calls == ["cpu", "cpu"]


def test_a_recall_of_one_is_exact():
    x = rows_of("uniform", 3000)
    assert choose_buckets(3000, 50, 1.0) == EXACT
    assert torch.equal(topk(x, 50, recall=1).indices.sort().values, x.topk(50).indices.sort().values)


def test_where_there_is_no_kernel_the_result_is_exact():
    assert choose_buckets(3000, 50, 0.9, "meta") == EXACT
    assert topk(torch.zeros(2, 3000, device="meta"), 50, recall=0.9).indices.shape == (2, 50)


def test_compile(monkeypatch):
    monkeypatch.setattr(topk_recall, "_measure", lambda device: table(10.0, (1.0,) * 4))
    x = torch.randn(3, 5000)
    compiled = torch.compile(lambda x: topk(x, 20, recall=0.9, sorted=True), fullgraph=True)
    for ours, theirs in zip(compiled(x), topk(x, 20, recall=0.9, sorted=True), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "error, match, call",
    [
        (ValueError, r"recall must be in \(0, 1\], got 0", lambda x: topk(x, 2, recall=0)),
        (ValueError, r"recall must be in \(0, 1\], got 1.5", lambda x: topk(x, 2, recall=1.5)),
        (ValueError, r"recall must be in \(0, 1\], got nan", lambda x: topk(x, 2, recall=math.nan)),
        (TypeError, "recall must be a number, got '1'", lambda x: topk(x, 2, recall="1")),
        (ValueError, "recall chooses the buckets, but got buckets 9", lambda x: topk(x, 2, recall=0.9, buckets=9)),
        (
            ValueError,
            "recall can be promised for interleaved.*'contiguous'",
            lambda x: topk(x, 2, recall=0.9, assignment="contiguous"),
        ),
        (ValueError, r"k must be in \[1, 5\], got 6", lambda x: expected_recall(5, 6, 3, 2)),
        (ValueError, "buckets and per_bucket must be at least 1, got 0 and 2", lambda x: expected_recall(5, 2, 0, 2)),
        (ValueError, r"k must be in \[1, 5\], got 0", lambda x: choose_buckets(5, 0, 0.9)),
        (ValueError, r"recall must be in \(0, 1\], got 2", lambda x: choose_buckets(5, 1, 2)),
    ],
)
def test_bad_input_names_the_argument(error, match, call):
    with pytest.raises(error, match=f"^{match}"):
        call(torch.zeros(2, 50))
