"""What loading takes: seconds, memory after it and at its peak, beside the size of the files.

python bench/loading.py MODEL [--dtype int8]

MODEL is anything that pyspec.load takes. Memory is that of this process, without what it had before: Python, torch and
pyspec. Run it twice; the first time the files come from the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch

import pyspec
from pyspec.checkpoints.sources import find_source


def memory() -> dict[str, int]:
    """Bytes in memory now and at most so far, as Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line[:5]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmRSS", "VmHWM"))}


def load(source: Path, dtype: torch.dtype | str | None = None) -> dict:
    """Loads a model and tells what that took; bytes are those beside what was in memory before."""
    files = [source] if source.is_file() else [file for file in source.iterdir() if file.suffix == ".safetensors"]
    size = sum(os.path.getsize(file) for file in files)
    before, start = memory(), time.perf_counter()
    needs = []
    runner = pyspec.load(source, dtype=dtype, device="cpu", announce=needs.append)
    seconds, after = time.perf_counter() - start, memory()
    return {
        "files": size,
        "seconds": seconds,
        "kept_in": str(runner.weight_dtype),
        "stated": str(needs[0]),
        "before": before["VmRSS"],
        "over_file": (after["VmRSS"] - before["VmRSS"]) / size,
        "peak_over_file": (after["VmHWM"] - before["VmRSS"]) / size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dtype", help="float32, bfloat16, float16, int8 or int4")
    parser.add_argument("--json", action="store_true", help="all of it as one line of JSON")
    arguments = parser.parse_args()
    dtype = arguments.dtype if arguments.dtype in (None, "int4") else getattr(torch, arguments.dtype)
    source = find_source(arguments.model)
    took = load(source, dtype)
    if arguments.json:
        print(json.dumps(took))
        return
    size, threads = took["files"] / 1e6, torch.get_num_threads()
    print(f"{source}: {size:.0f} MB, {took['seconds']:.1f} s, {took['kept_in']}, {threads} threads")
    print(f"before {took['before'] / 1e6:.0f} MB; {took['stated']}")
    after, peak = took["over_file"], took["peak_over_file"]
    print(f"after {after * size:.0f} MB, {after:.2f} of the files; peak {peak * size:.0f} MB, {peak:.2f}")


if __name__ == "__main__":
    main()
