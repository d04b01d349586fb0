"""Where results go: JSON and figures, each written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench"  # of a clone
RESULTS = Path(os.environ.get("PYSPEC_RESULTS") or BENCH / "results")


def save(name: str, result: dict) -> Path:
    """Writes <name>.json into bench/results of a clone, or into the folder PYSPEC_RESULTS.

    Where PYSPEC_ISA asks for an instruction set, the file is <name>_<set>.json: it stands for another machine.
    """
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{'_'.join(filter(None, (name, os.environ.get('PYSPEC_ISA'))))}.json"
    write(path, result)
    return path


def write(path: Path, result: dict) -> None:
    """Writes a result as JSON; who reads the file meanwhile finds the one before."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def pyplot():
    """matplotlib.pyplot, for figures that go to files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def save_figure(figure, what: str, result: dict, path: Path) -> None:
    """Writes a figure, titled with what it shows, and where and when that was measured."""
    machine = result["machine"]
    is_gpu = result.get("device") == "cuda"
    where = machine["gpu"] if is_gpu else f"{machine['cpu']}, {machine['threads']} threads"
    figure.suptitle(f"{what}; {where}, torch {machine['torch']}, {machine['date']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot().close(figure)
