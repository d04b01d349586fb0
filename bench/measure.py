"""What every benchmark here shares: timing in turn, floors measured in the same process, and who the machine is."""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pyspec.machine import cpu_name

RESULTS = Path(__file__).parent / "results"


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


def replayed(call: Callable, device: str) -> Callable:
    """A call as a runner makes it: on a GPU its launches are replayed as a CUDA graph."""
    if device == "cpu":
        return call
    call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def read_bandwidth(device: str = "cpu") -> float:
    """Bytes a second of one pass over 256 MiB."""
    data = torch.ones(64 * 2**20, device=device)
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


def positive(text: str) -> int:
    """A number on a command line that must be at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def progress(console):
    """A rich progress bar: a description, done of all, and the time."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console)


def on_device(name: str, device: str) -> str:
    """The name of a result: those of a GPU are told apart."""
    return name if device == "cpu" else f"{name}_{device}"


def save(name: str, result: dict) -> Path:
    """Writes bench/results/<name>.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
