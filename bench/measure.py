"""What every benchmark here shares, beside pyspec.benchmarks.measure."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch

from pyspec.benchmarks.measure import in_turn, machine, multiply_rate, read_bandwidth

__all__ = [
    "in_turn",
    "machine",
    "multiply_rate",
    "on_device",
    "positive",
    "progress",
    "pyplot",
    "read_bandwidth",
    "replayed",
    "save",
    "save_figure",
]

RESULTS = Path(__file__).parent / "results"


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


def pyplot():
    """matplotlib.pyplot, for figures that go to files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def save_figure(figure, what: str, result: dict, path: Path) -> None:
    """Writes a figure, titled with what it shows, and where and when that was measured."""
    machine = result["machine"]
    where = machine["gpu"] if result["device"] == "cuda" else f"{machine['cpu']}, {machine['threads']} threads"
    figure.suptitle(f"{what}; {where}, torch {machine['torch']}, {machine['date']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
