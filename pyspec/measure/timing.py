"""Timing in turn, floors measured in the same process, and who the machine is."""

from __future__ import annotations

import datetime
import os
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from pyspec.machine import cpu_name
from pyspec.ops import lay_out_weight, linear

LEAST_REPEATS, MOST_REPEATS = 5, 200


def in_turn(calls: dict[str, Callable], repeats: int = 40, warmup: int = 3) -> dict[str, float]:
    """Median seconds of each call; A B A B ..., so that a machine whose speed drifts is fair to all.

    Once a process has used its GPU, a call's time is that between two events around it.
    """
    for _ in range(warmup):
        for call in calls.values():
            call()
    timed = _seconds_by_events if torch.cuda.is_initialized() else _seconds
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            seconds[name].append(timed(call))
    return {name: statistics.median(times) for name, times in seconds.items()}


def in_turn_for(calls: dict[str, Callable], seconds: float) -> dict[str, float]:
    """Times calls as in_turn does, with as many repeats as take about so many seconds in all."""
    first = in_turn(calls, repeats=1, warmup=1)
    repeats = min(max(round(seconds / sum(first.values())), LEAST_REPEATS), MOST_REPEATS)
    return in_turn(calls, repeats, warmup=0)


def _seconds(call: Callable) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _seconds_by_events(call: Callable) -> float:
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def replayed(calls: Sequence[Callable]) -> Callable:
    """Some calls, one after another, as a runner makes them on a GPU: their launches replayed as one CUDA graph."""
    side = torch.cuda.Stream()  # on which nothing of the warm-up meets the capture
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()

    def replay(inputs=calls) -> None:  # which keeps what the calls read: a graph does not
        graph.replay()

    return replay


def read_bandwidth(device: str = "cpu") -> float:
    """Bytes a second of one pass over 256 MiB; on a GPU of copying 4 GB, read and written bytes together."""
    if device == "cuda":
        data = torch.randn(2**30, device=device)
        other = torch.empty_like(data)
        return 2 * data.nbytes / in_turn({"copy": lambda: other.copy_(data)}, repeats=9)["copy"]
    data = torch.ones(64 * 2**20, dtype=torch.float32, device=device)
    return data.nbytes / in_turn({"read": data.sum}, repeats=9)["read"]


def multiply_rate(dtype: torch.dtype, device: str = "cpu") -> float:
    """Operations a second of a large matrix product in dtype, or in fp32 where that is faster."""
    size = 8192 if device == "cuda" else 2048

    def call(dtype: torch.dtype, size: int) -> Callable:
        a = torch.randn(size, size, device=device).to(dtype)
        product = torch._int_mm if dtype == torch.int8 else torch.mm
        return lambda: product(a, a)

    dtypes = {dtype, torch.float32}
    if device == "cpu":  # without instructions for a dtype a large product takes minutes, a small one tells
        small = in_turn({dtype: call(dtype, 512) for dtype in dtypes}, repeats=5)
        dtypes = {min(small, key=small.get)}
    seconds = in_turn({dtype: call(dtype, size) for dtype in dtypes}, repeats=9)
    return 2 * size**3 / min(seconds.values())


def kernel_rate(dtype: torch.dtype) -> float:
    """Operations a second of `linear` on the CPU, 64 rows times a weight of dtype that caches hold: the best of 40."""
    rows, size = 64, 1024
    x = torch.randn(rows, size, dtype=torch.float32 if dtype == torch.int8 else dtype, device="cpu")
    weight = lay_out_weight(torch.randn(size, size, dtype=x.dtype, device="cpu"), dtype)
    return 2 * rows * size**2 / min(_seconds(lambda: linear(x, weight)) for _ in range(40))


def machine() -> dict[str, str | int]:
    """The machine and software that a result was measured on."""
    info = {
        "cpu": cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    if isa := os.environ.get("PYSPEC_ISA"):
        info["PYSPEC_ISA"] = isa
    if torch.cuda.is_available():
        info["gpu"] = torch.cuda.get_device_name()
    return info
