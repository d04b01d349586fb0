"""What are the GPU kernels worth, judged by their machine code alone? Needs no GPU.

    python bench/compiled_kernels.py              a table of this Triton's and this nvcc's code, beside what is recorded
    python bench/compiled_kernels.py --write      records it in bench/results/compiled_kernels_*.json
    python bench/compiled_kernels.py gear         only the calls with that in their name

Each call of gpu_calls.py runs its launcher as on a GPU, so that what is compiled is what a model would run. Of every
kernel that it launches: registers, stack, spinning atomics, how many blocks a multiprocessor holds, and what one round
of its inner loop, a tile, issues. tests/kernels/test_compiled_kernels.py compiles them anew and fails where one got
worse.

The microseconds are two floors of a call on an H100: its bytes at the bandwidth of the memory, and its instructions at
the rate of the busiest pipe of the busiest multiprocessor, where it is known how many tiles there are. Nothing waits in
them, and nothing is launched.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from gpu_calls import CALLS
from machine_code import SPINNING, TENSOR_CORES, Code, blocks_at_a_time, functions
from torch import Tensor
from without_gpu import MULTIPROCESSORS, launches

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench/results"
ARCHITECTURES = (80, 90, 100)
BANDWIDTH, CLOCK = 3.35e12, 1.755e9  # bytes and clocks a second
LEEWAY = 1.1  # how much longer a tile or more registers may be, until somebody looks


# ==== one call's kernels ====


@dataclass(frozen=True)
class Launch:
    name: str
    grid: tuple[int, int, int]
    threads: int
    shared: int  # bytes of dynamic shared memory
    code: Code


def bytes_of(values) -> int:
    """Of all tensors among them; views of one memory count once."""
    found = {}
    for tensor in values:
        if isinstance(tensor, Tensor):
            memory = tensor.untyped_storage()
            parts = found.setdefault(memory.data_ptr(), ({}, memory.nbytes()))[0]
            parts[tensor.data_ptr(), tensor.dtype] = tensor.numel() * tensor.itemsize
    return sum(min(sum(parts.values()), size) for parts, size in found.values())


def on_host():
    """tests/helpers/cuda_on_host.py, by which the bindings and the launches of C++ kernels run."""
    sys.path.insert(0, str(ROOT))
    from tests.helpers import cuda_on_host

    return cuda_on_host


@functools.cache
def launches_of(name: str, architecture: int) -> tuple[list[Launch], int]:
    """The launches of a call, and the bytes of all tensors that they are given."""
    call, given = CALLS[name], []
    if not call.source:
        with launches(architecture) as found:
            call.run()
        code = [functions(each.cubin)[each.name] for each in found]
        threads = [32 * each.warps for each in found]
        given = [value for each in found for value in each.arguments]
    else:
        op, library = on_host().op_on_host(call.source)

        def noted(*arguments):
            given.extend((*arguments, *torch.utils._pytree.tree_leaves(op(*arguments))))

        library.set(multiprocessors=MULTIPROCESSORS)
        with library.noting() as found:
            call.run(noted)
        library.set()
        compiled = compiled_source(call.source, architecture)
        code = [compiled[each.name] for each in found]
        threads = [each.threads for each in found]
    every = zip(found, threads, code, strict=True)
    return [Launch(each.name, each.grid, size, each.shared, one) for each, size, one in every], bytes_of(given)


@functools.cache
def compiled_source(name: str, architecture: int) -> dict[str, Code]:
    """The kernels of kernels/cuda/<name>.cu, by their names in C++."""
    source = ROOT / f"kernels/cuda/{name}.cu"
    command = [nvcc(), "-std=c++17", f"-arch=sm_{architecture}", "-cubin", f"-I{ROOT / 'kernels'}", str(source)]
    digest = hashlib.sha256(repr((command, nvcc_version())).encode())
    for path in sorted([source, *(ROOT / "kernels").glob("**/*.h")]):
        digest.update(path.read_bytes())
    cubin = ROOT / "build/compiled_kernels" / f"{name}_{architecture}_{digest.hexdigest()[:16]}.cubin"
    if not cubin.exists():
        cubin.parent.mkdir(parents=True, exist_ok=True)
        temporary = cubin.with_suffix(f".{os.getpid()}")  # several test processes may compile it at once
        subprocess.run([*command, "-o", str(temporary)], check=True)
        temporary.replace(cubin)
    found = functions(cubin.read_bytes())
    names = subprocess.run(["c++filt", *found], capture_output=True, text=True, check=True).stdout.splitlines()
    return {on_host().kernel_name(name): code for name, code in zip(names, found.values(), strict=True)}


def nvcc() -> str | None:
    folder = os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"
    return shutil.which("nvcc") or shutil.which("nvcc", path=folder)


@functools.cache
def nvcc_version() -> str:
    text = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", text)[1]


# ==== what is recorded ====


def figures(launch: Launch, architecture: int) -> dict:
    code = launch.code
    return {
        "registers": code.registers,
        "stack": code.stack,
        "blocks": blocks_at_a_time(code, launch.threads, launch.shared, architecture),
        "spinning": code.count(SPINNING),
        "tensor_cores": code.count(TENSOR_CORES),
        "tiles": [len(tile.lines) for tile in code.tiles],
        "loads": {str(size): count for size, count in code.loads().items()},
    }


def measure(name: str, architecture: int) -> dict[str, dict]:
    """The figures of each kernel of a call."""
    return {launch.name: figures(launch, architecture) for launch in launches_of(name, architecture)[0]}


def floors(name: str) -> dict:
    """On an H100: microseconds for the bytes and for the instructions of all launches, and the busiest pipe of the
    longest."""
    found, moved = launches_of(name, 90)
    busiest = []
    for launch in found:
        tiles = CALLS[name].tiles.get(launch.name)
        if tiles is None and launch.code.tiles:
            continue
        blocks, warps = math.prod(launch.grid), -(-launch.threads // 32)
        here = -(-blocks // MULTIPROCESSORS)  # on the busiest multiprocessor
        at_a_time = min(here, blocks_at_a_time(launch.code, launch.threads, launch.shared, 90))
        idle = 4 / min(4, warps * at_a_time)  # a warp stays with one of four schedulers
        clocks = launch.code.without_tiles().clocks()  # of a warp
        for pipe, more in launch.code.tiles[0].clocks().items() if tiles else ():
            clocks[pipe] = clocks.get(pipe, 0) + tiles / blocks * more
        clocks = {pipe: here * warps * (1 if pipe == "tensor cores" else idle) * each for pipe, each in clocks.items()}
        busiest.append(max((value / CLOCK * 1e6, pipe) for pipe, value in clocks.items()))
    memory = {"memory": round(moved / BANDWIDTH * 1e6, 2)}
    if not busiest:
        return memory
    return memory | {"instructions": round(sum(time for time, _ in busiest), 2), "pipe": max(busiest)[1]}


def worse(found: dict, recorded: dict) -> list[str]:
    """What got worse about one kernel."""
    faults = []
    for key in ("registers", "stack", "spinning"):
        leeway = LEEWAY if key == "registers" else 1.0
        if found[key] > recorded[key] * leeway:
            faults.append(f"{key}: {recorded[key]} -> {found[key]}")
    for key in ("blocks", "tensor_cores"):
        if found[key] < recorded[key] and (key == "blocks" or not found[key]):
            faults.append(f"{key}: {recorded[key]} -> {found[key]}")
    if max(found["tiles"], default=0) > max(recorded["tiles"], default=0) * LEEWAY:
        faults.append(f"instructions of a tile: {recorded['tiles']} -> {found['tiles']}")
    if min(map(int, found["loads"]), default=16) < min(map(int, recorded["loads"]), default=16):
        faults.append(f"loads, by their bytes: {recorded['loads']} -> {found['loads']}")
    return faults


def compiler_of(name: str) -> str:
    """What compiles a call's kernels, as "Triton 3.6"."""
    return f"nvcc {nvcc_version()}" if CALLS[name].source else f"Triton {triton.__version__.rsplit('.', 1)[0]}"


def record_of(name: str) -> Path:
    """The file with a call's figures, of the compiler that there is."""
    return RESULTS / f"compiled_kernels_{re.sub('[ .]', '_', compiler_of(name).lower())}.json"


@functools.cache
def recorded(path: Path) -> dict[str, dict]:
    """By call: its floors, and for each architecture the figures of its kernels."""
    return json.loads(path.read_text())["calls"] if path.exists() else {}


def in_lines(compiler: str, calls: dict[str, dict]) -> str:
    """JSON; of each call a line for the floors and for each architecture."""
    parts = []
    for name, figures in calls.items():
        lines = ",\n".join(f"   {json.dumps(key)}: {json.dumps(part)}" for key, part in figures.items())
        parts.append(f"  {json.dumps(name)}: {{\n{lines}\n  }}")
    return f'{{\n "compiler": "{compiler}",\n "calls": {{\n' + ",\n".join(parts) + "\n }\n}\n"


def told(floor: dict) -> str:
    instructions = f", {floor['pipe']} {floor['instructions']} us" if "pipe" in floor else ""
    return f"memory {floor['memory']} us{instructions}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of the names of calls; all by default")
    parser.add_argument("--write", action="store_true", help="record the figures of all architectures")
    options = parser.parse_args()
    names = [name for name in CALLS if not options.names or any(part in name for part in options.names)]
    written = {}
    print(f"{'':42}registers stack blocks spinning tensor cores  tiles, and loads by their bytes")
    for name in names:
        floor, before = floors(name), recorded(record_of(name)).get(name)
        print(f"{name}: {told(floor)}" + (f"; recorded: {told(before['floors'])}" if before else ""))
        for kernel, one in measure(name, 90).items():
            cells = [one[key] for key in ("registers", "stack", "blocks", "spinning", "tensor_cores")]
            print(f"  {kernel:40}{'{:9}{:6}{:7}{:9}{:13}'.format(*cells)}  {one['tiles']} {one['loads']}")
            for fault in worse(one, before["90"].get(kernel, one) if before else one):
                print(f"    WORSE: {fault}")
        if options.write:
            found = {str(architecture): measure(name, architecture) for architecture in ARCHITECTURES}
            written.setdefault((record_of(name), compiler_of(name)), {})[name] = {"floors": floor} | found
    for (path, compiler), found in written.items():
        kept = recorded(path) | found
        path.write_text(in_lines(compiler, {name: kept[name] for name in CALLS if name in kept}))
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
