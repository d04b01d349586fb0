"""Timing in turn, floors measured in the same process, and who the machine is."""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Callable

import torch

from pyspec.machine import cpu_name

__all__ = ["in_turn", "machine", "multiply_rate", "read_bandwidth"]


def in_turn(calls: dict[str, Callable], repeats: int = 40, warmup: int = 3) -> dict[str, float]:
    """Median seconds of each call; A B A B ..., so that a machine whose speed drifts is fair to all."""
    for _ in range(warmup):
        for call in calls.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def read_bandwidth(device: str = "cpu") -> float:
    """Bytes a second of one pass over 256 MiB."""
    data = torch.ones(64 * 2**20, dtype=torch.float32, device=device)
    return data.nbytes / in_turn({"read": data.sum}, repeats=9)["read"]


def multiply_rate(dtype: torch.dtype, device: str = "cpu") -> float:
    """Operations a second of a large matrix product in dtype, or in fp32 where that is faster."""

    def call(dtype: torch.dtype) -> Callable:
        a = torch.randn(2048, 2048, device=device).to(dtype)
        product = torch._int_mm if dtype == torch.int8 else torch.mm
        return lambda: product(a, a)

    seconds = in_turn({str(dtype): call(dtype) for dtype in {dtype, torch.float32}}, repeats=9)
    return 2 * 2048**3 / min(seconds.values())


def machine() -> dict[str, str | int]:
    """The machine and software that a result was measured on."""
    info = {
        "cpu": cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    if torch.cuda.is_available():
        info["gpu"] = torch.cuda.get_device_name()
    return info
