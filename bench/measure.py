"""What every benchmark here shares, beside pyspec.measure.measure."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from pyspec.measure.measure import in_turn, machine, multiply_rate, read_bandwidth, replayed

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

RESULTS = Path(os.environ.get("PYSPEC_RESULTS") or Path(__file__).parent / "results")


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
    """Writes <name>.json into bench/results, or into the folder PYSPEC_RESULTS; whole or not at all."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path, part = RESULTS / f"{name}.json", RESULTS / f".{name}.part"
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(path)
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
