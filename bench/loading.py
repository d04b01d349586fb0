"""What loading takes: seconds, memory after it and at its peak, beside the size of the files.

python bench/loading.py MODEL [--dtype int8]

MODEL is anything that pyspec.load takes. Memory is that of this process, without what it had before: Python, torch and
pyspec. Run it twice; the first time the files come from the disk.
"""

from __future__ import annotations

import argparse
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dtype", help="float32, bfloat16, float16, int8 or int4")
    arguments = parser.parse_args()
    dtype = arguments.dtype if arguments.dtype in (None, "int4") else getattr(torch, arguments.dtype)
    source = find_source(arguments.model)
    files = [source] if source.is_file() else [file for file in source.iterdir() if file.suffix == ".safetensors"]
    size = sum(os.path.getsize(file) for file in files)
    before, start = memory(), time.perf_counter()
    needs = []
    runner = pyspec.load(source, dtype=dtype, device="cpu", announce=needs.append)
    seconds, after = time.perf_counter() - start, memory()
    kept, peak = after["VmRSS"] - before["VmRSS"], after["VmHWM"] - before["VmRSS"]
    print(f"{source}: {size / 1e6:.0f} MB, {seconds:.1f} s, {runner.weight_dtype}, {torch.get_num_threads()} threads")
    print(f"before {before['VmRSS'] / 1e6:.0f} MB; {needs[0]}")
    print(f"after {kept / 1e6:.0f} MB, {kept / size:.2f} of the files; peak {peak / 1e6:.0f} MB, {peak / size:.2f}")


if __name__ == "__main__":
    main()
