"""What buckets promise and what they cost: how `topk` keeps its word about recall at the lowest price.

Let a bucket hold s of n values and X of the k best. With the best at random places X is hypergeometric, and the bucket
keeps min(X, per_bucket) of them, so

    expected recall = sum over buckets of E[min(X, per_bucket)] / k,
    E[min(X, d)] = d - sum over j < d of (d - j) C(k, j) C(n - k, s - j) / C(n, s)

whether a second stage follows or not: it never drops one of the k best. For s = n / buckets this is Theorem 1 of Samaga
et al., "A Faster Generalized Two-Stage Approximate Top-K", arXiv 2506.04165; the buckets are those of Key et al.,
"Approximate Top-k for Increased Parallelism", arXiv 2412.04358.

What they cost is measured, once for a device, for a few sizes of a row and a few numbers of candidates, and kept in the
user's cache folder: seconds of the exact op, and of one stage for each per_bucket. A second stage costs what the exact
op costs on a row of the candidates. A CPU is timed on one row. A GPU is on some, replayed as a CUDA graph: a single one
is over before the next launch, whatever is asked for.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from pyspec.machine import store
from pyspec.ops._library import backends

MOST_PER_BUCKET = 4  # kMostPerBucket in kernels/params/topk.h
LANES = 16  # buckets that a kernel handles together
SIZES = {"cpu": (4096, 16384, 32768), "cuda": (4096, 32768, 262144)}  # rows that are timed; a CPU's on one thread
ROWS = {"cpu": 1, "cuda": 64}
KEPT = (16, 256, 2048)  # candidates, or k, that are timed
REPEATS = 15
IN_A_GRAPH = 10
WORTH_IT = 0.9  # of the exact op's seconds: for more, everything is found


class Buckets(NamedTuple):
    """The way in which a row is searched; 0 buckets stand for the exact result."""

    buckets: int
    per_bucket: int


EXACT = Buckets(0, 1)


def bucket_sizes(n: int, buckets: int) -> tuple[int, int]:
    """Values in each of the larger buckets, and how many buckets are larger by one than the rest."""
    return (n // buckets + 1, n % buckets) if n % buckets else (n // buckets, buckets)


def expected_recall(n: int, k: int, buckets: int, per_bucket: int) -> float:
    """The share of the k best of n values that is found on average, for values in random order.

    Raises:
        ValueError: k is not in [1, n], or buckets or per_bucket is less than 1.
    """
    if not 1 <= k <= n:
        raise ValueError(f"k must be in [1, {n}], got {k}")
    if buckets < 1 or per_bucket < 1:
        raise ValueError(f"buckets and per_bucket must be at least 1, got {buckets} and {per_bucket}")
    size, larger = bucket_sizes(n, buckets)
    found = larger * _kept(n, k, size, per_bucket) + (buckets - larger) * _kept(n, k, size - 1, per_bucket)
    return min(found / k, 1.0)


def _kept(n: int, k: int, size: int, per_bucket: int) -> float:
    """E[min(X, per_bucket)], X of the k best among size of n values."""
    if min(size, k) <= per_bucket:
        return size * k / n
    every = _log_choose(n, size)
    lost = 0.0
    for j in range(max(0, size - (n - k)), min(per_bucket, k + 1)):
        lost += (per_bucket - j) * math.exp(_log_choose(k, j) + _log_choose(n - k, size - j) - every)
    return per_bucket - lost


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def choose_buckets(n: int, k: int, recall: float, device: torch.device | str = "cpu") -> Buckets:
    """The cheapest interleaved buckets on a device whose expected recall is at least recall; EXACT where that is.

    What they cost is measured at the first call on a device (a fraction of a second) and then kept.

    Raises:
        ValueError: k is not in [1, n], or recall is not in (0, 1].
    """
    if not 1 <= k <= n:
        raise ValueError(f"k must be in [1, {n}], got {k}")
    if not 0 < recall <= 1:
        raise ValueError(f"recall must be in (0, 1], got {recall}")
    return _choose(n, k, float(recall), torch.device(device).type)


# a constant for torch.compile: what torch.compiler.assume_constant_result sets, which would import all of dynamo
choose_buckets._dynamo_marked_constant = True


@functools.lru_cache(maxsize=4096)
def _choose(n: int, k: int, recall: float, device: str) -> Buckets:
    kernel = next((row for row in backends() if row["op"] == "topk" and row["device"] == device), None)
    if kernel is None or kernel["backend"] == "reference":
        return EXACT  # which the reference's buckets begin with
    costs = _costs(device, store.key(kernel=kernel, rows=ROWS[device], sizes=SIZES[device], kept=KEPT))
    best, least = EXACT, WORTH_IT * costs.exact(n, k)
    for per_bucket in range(1, MOST_PER_BUCKET + 1):
        buckets = fewest_buckets(n, k, recall, per_bucket)
        if buckets * per_bucket < n and costs.bucketed(n, k, buckets, per_bucket) < least:
            best, least = Buckets(buckets, per_bucket), costs.bucketed(n, k, buckets, per_bucket)
    return best


def fewest_buckets(n: int, k: int, recall: float, per_bucket: int) -> int:
    """The fewest buckets that keep the promise: as many as one stage has, or a multiple of what a kernel handles."""
    fewest = -(-k // per_bucket)
    if expected_recall(n, k, fewest, per_bucket) >= recall:
        return fewest
    low, high = fewest // LANES, max(fewest // LANES, 1)  # in LANES; low is too few
    while high * LANES < n and expected_recall(n, k, high * LANES, per_bucket) < recall:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        is_enough = expected_recall(n, k, middle * LANES, per_bucket) >= recall
        low, high = (low, middle) if is_enough else (middle, high)
    return high * LANES


class _Costs:
    """Seconds of a row, on lines between what was measured in logarithms of n and of k or candidates.

    seconds: for the exact op, then one stage of 1, 2, ... per bucket: for each of sizes one for each of KEPT.
    """

    def __init__(self, sizes: tuple[int, ...], seconds: list[list[list[float]]]):
        table = np.asarray(seconds, float)
        if table.shape != (1 + MOST_PER_BUCKET, len(sizes), len(KEPT)) or not (0 < table.min() <= table.max() < np.inf):
            raise ValueError(f"seconds must be positive for every mode, size and number of candidates, got {seconds}")
        self._sizes = sizes
        self._logs = [[[math.log(one) for one in row] for row in rows] for rows in seconds]

    def exact(self, n: int, k: int) -> float:
        return self._seconds(0, n, k)

    def bucketed(self, n: int, k: int, buckets: int, per_bucket: int) -> float:
        kept = buckets * per_bucket
        return self._seconds(per_bucket, n, kept) + (self.exact(kept, k) if kept > k else 0.0)

    def _seconds(self, per_bucket: int, n: int, kept: int) -> float:
        by_kept = [_line(self._sizes, column, n) for column in zip(*self._logs[per_bucket], strict=True)]
        return math.exp(_line(KEPT, by_kept, kept))


def _line(sizes: tuple[int, ...], values: list[float], size: int) -> float:
    """The value at size, on lines over the logarithm of sizes that go on beyond the first and the last."""
    last = next((i for i in range(1, len(sizes)) if size < sizes[i]), len(sizes) - 1)
    part = math.log(size / sizes[last - 1]) / math.log(sizes[last] / sizes[last - 1])
    return values[last - 1] + (values[last] - values[last - 1]) * part


@functools.lru_cache
def _costs(device: str, key: str) -> _Costs:
    try:
        return _Costs(SIZES[device], store.read("topk", key))
    except (TypeError, ValueError):
        seconds = _measure(device)
        store.keep("topk", key, seconds)
        return _Costs(SIZES[device], seconds)


def _measure(device: str) -> list[list[list[float]]]:
    """Seconds for _Costs, without those of a call; the least of some, for what other programs add is no cost."""
    generator = torch.Generator("cpu").manual_seed(0)
    modes = range(MOST_PER_BUCKET + 1)
    seconds: list[list[list[float]]] = [[] for _ in modes]
    tiny = _timer(torch.zeros(1, 16, dtype=torch.float32, device=device), 1, 0)
    call = min(tiny() for _ in range(10 * REPEATS))
    for n in SIZES[device]:
        x = torch.randn(ROWS[device], n, generator=generator, dtype=torch.float32, device="cpu").to(device)
        timers = [[_timer(x, kept, per_bucket) for kept in KEPT] for per_bucket in modes]
        turns = [[[timer() for timer in row] for row in timers] for _ in range(REPEATS)]
        for per_bucket in modes:
            least = [min(turn[per_bucket][i] for turn in turns) for i in range(len(KEPT))]
            seconds[per_bucket].append([max(one - call, 1e-7) for one in least])
    return seconds


def _timer(x: torch.Tensor, kept: int, per_bucket: int) -> Callable[[], float]:
    """Runs the exact op with k = kept, or one stage, and returns its seconds."""
    buckets = kept // per_bucket if per_bucket else 0
    arguments = (x, buckets * per_bucket or kept, buckets, per_bucket or 1, True, True, False)
    op = torch.ops.pyspec.topk.default
    op(*arguments)
    if not x.is_cuda:
        return lambda: _seconds(lambda: op(*arguments))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(IN_A_GRAPH):
            op(*arguments)

    def replay():
        graph.replay()
        torch.cuda.synchronize(x.device)

    return lambda: _seconds(replay) / IN_A_GRAPH


def _seconds(call: Callable) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
