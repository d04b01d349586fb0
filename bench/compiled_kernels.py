"""What are the GPU kernels worth, judged by their machine code alone? Needs no GPU.

    python bench/compiled_kernels.py              a table of this Triton's and this nvcc's code, beside what is recorded
    python bench/compiled_kernels.py --write      records it in bench/results/compiled_kernels_*.json
    python bench/compiled_kernels.py gear         only the calls with that in their name

Each call below runs its launcher as on a GPU, so that what is compiled is what a model would run. Of every kernel that
it launches: registers, stack, spinning atomics, how many blocks a multiprocessor holds, and what one round of its inner
loop, a tile, issues. tests/kernels/test_compiled_kernels.py compiles them anew and fails where one got worse.

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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton
from machine_code import SPINNING, TENSOR_CORES, Code, blocks_at_a_time, functions
from torch import Tensor
from without_gpu import MULTIPROCESSORS, launches

from pyspec.kernels.block_masked_attention import block_masked_attention
from pyspec.kernels.gear import gear_packed_attention
from pyspec.kernels.linear import linear
from pyspec.kernels.merge_attention import merge_attention
from pyspec.kernels.rms_norm import rms_norm
from pyspec.kernels.rotary_write import rotary_write
from pyspec.kernels.row_statistics import row_statistics
from pyspec.kernels.swiglu import swiglu
from pyspec.kernels.tree_attention import tree_attention
from pyspec.ops.gear_format import GearFormat
from pyspec.ops.residual_vq import ResidualVqFormat
from pyspec.ops.selective_state import Round
from pyspec.tree import DraftTree

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench/results"
ARCHITECTURES = (80, 90, 100)
BANDWIDTH, CLOCK = 3.35e12, 1.755e9  # bytes and clocks a second
LEEWAY = 1.1  # how much longer a tile or more registers may be, until somebody looks
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
INT32, BYTES = torch.int32, torch.uint8


def new(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype)


@dataclass(frozen=True)
class Call:
    """A call of an op, and how many tiles all programs of a kernel go through in it, where that is known."""

    run: Callable[[], object]
    tiles: dict[str, float] = field(default_factory=dict)
    source: str = ""  # of CUDA C++: run takes the op, which tests.helpers.cuda_on_host runs without its launches


# ==== calls ====


def attend_to_tree(nodes, prefix, dtype=BF16, heads=32, kv_heads=8, head_dim=128, window=None, softcap=None, page=None):
    slots = prefix + nodes
    words, group = -(-nodes // 32), heads // kv_heads
    rows = 64 if dtype == BF16 and head_dim <= 128 else 16  # of a program
    head_blocks = -(-group // rows)
    sets = head_blocks * -(-nodes // (rows // min(group, rows)))

    def run():
        q = new(1, nodes, heads, head_dim, dtype=dtype).transpose(1, 2)
        cache, table = new(2, 1, kv_heads, slots, head_dim, dtype=dtype), None
        if page:
            cache = new(2, -(-slots // page), kv_heads, page, head_dim, dtype=dtype)
            table = new(1, cache.shape[1], dtype=INT32)
        places = new(1, nodes, words, dtype=INT32), new(1, dtype=INT32)
        return tree_attention(q, *cache, *places, head_dim**-0.5, softcap, window, table)

    seen = min(prefix, window or prefix)
    return Call(run, {"fold_kernel": kv_heads * (seen // 64 * sets + nodes * head_blocks)})


def project(rows, outputs, inputs, dtype=BF16, out_dtype=FP32):
    def run():
        groups = -(-inputs // 32)
        row_bytes = 32 * groups + 2 * (groups + -groups % 8)
        weight = new(outputs, row_bytes, dtype=BYTES) if dtype == BYTES else new(outputs, inputs, dtype=dtype)
        return linear(new(rows, inputs, dtype=FP32 if dtype == FP32 else BF16), weight, None, outputs, out_dtype)

    kernel, tile = ("int8_kernel", 128 * 128) if dtype == BYTES else ("float_kernel", 64 * 64)
    sets = -(-rows // (64 if dtype == BF16 else 16))
    return Call(run, {kernel: outputs * inputs / tile * sets})


def read_statistics(rows, vocab):
    return Call(lambda: row_statistics(new(rows, vocab, dtype=FP32), None))


def attend_to_records(nodes, tokens, format, heads=32, kv_heads=8, head_dim=128):
    def run():
        packed = new(1, kv_heads, tokens // 128, format.record_bytes(head_dim), dtype=BYTES)
        q = new(1, nodes, heads, head_dim, dtype=BF16).transpose(1, 2)
        return gear_packed_attention(q, packed, new(1, nodes, dtype=INT32), *format.layout, head_dim**-0.5)

    return Call(run, {"fold_kernel": tokens // 128 * kv_heads * -(-nodes * heads // kv_heads // 16)})


def attend_to_blocks(batch, heads, rows, head_dim, dtype=BF16):
    """Causal: half of all tiles."""

    def run():
        blocks, words = rows // 128, 2
        full, partial = blocks * (blocks - 1), blocks * 2
        lists = new(1, 1, blocks, 2, dtype=INT32), new(full, dtype=INT32), new(1, 1, blocks, 2, dtype=INT32)
        lists = (*lists, new(partial, 2, dtype=INT32), new(2, words, 64, dtype=torch.int64))
        qkv = (new(batch, heads, rows, head_dim, dtype=dtype) for _ in range(3))
        return block_masked_attention(*qkv, *lists, None, None, head_dim**-0.5, None)

    tiles = batch * heads * (rows / 64) ** 2 / 2
    item_rows = (128 if head_dim <= 128 else 32) if dtype == BF16 else 16
    return Call(run, {"block_masked_attention_kernel": tiles * 64 / item_rows})


def normalise(rows, size):
    hidden = (rows, size)
    return Call(lambda: rms_norm(new(*hidden, dtype=FP32), new(*hidden, dtype=FP32), new(size, dtype=FP32), 1e-5, BF16))


def write_keys(rows, heads=32, kv_heads=8, head_dim=128):
    def run():
        qkv, cos_sin = new(rows, (heads + 2 * kv_heads) * head_dim, dtype=FP32), new(rows, 2, head_dim // 2, dtype=FP32)
        cache = new(2, 1, kv_heads, rows, head_dim)  # no more than is written
        return rotary_write(qkv, cos_sin, *(new(rows, dtype=INT32) for _ in range(3)), *cache, heads)

    return Call(run)


def merge(rows, head_dim):
    def run():
        parts = [new(rows, head_dim), new(rows, dtype=FP32)]
        return merge_attention(*parts, *parts)

    return Call(run)


def select(rows, size, k, dtype, buckets=0):
    return Call(lambda op: op(new(rows, size, dtype=dtype), k, buckets, 1, True, True, False), source="topk")


def chain_after(nodes, accepted):
    return Round.of([DraftTree.chain([0] * nodes)], [0], [list(range(accepted))], [0])


def advance(nodes, accepted, heads, channels, groups, states, per_state=False):
    """A layer's recurrence over a chain of nodes, after so many were accepted."""

    def run(op):
        wide = (new(nodes, groups * states) for _ in range(2))
        A = new(channels // 16, states, 16, dtype=FP32) if per_state else new(heads, dtype=FP32)
        state = new(1, channels // 16, states, 16, dtype=FP32)
        record = new(2, 1, nodes, channels + heads + groups * states, dtype=FP32)
        inputs = (new(nodes, channels), new(nodes, heads, dtype=FP32), A, *wide, new(channels, dtype=FP32), None, None)
        return op(state, record, *inputs, *chain_after(nodes, accepted).tensors(), BF16)

    return Call(run, source="selective_state")


def convolve(nodes, accepted, channels, taps=4):
    def run(op):
        inputs = (new(nodes, channels, dtype=FP32), new(taps, channels, dtype=FP32), new(channels, dtype=FP32))
        state, record = new(1, taps - 1, channels, dtype=FP32), new(2, 1, nodes, channels, dtype=FP32)
        return op(state, record, *inputs, *chain_after(nodes, accepted).tensors(), BF16)

    return Call(run, source="causal_conv")


def attend_to_codes(nodes, tokens, depth, codes, heads=32, kv_heads=8, head_dim=128):
    def run(op):
        record = ResidualVqFormat(depth, codes).record_bytes(head_dim)
        packed, books = new(1, kv_heads, tokens // 128, record, dtype=BYTES), new(2, depth, codes, 32, dtype=FP16)
        return op(new(1, heads, nodes, head_dim), packed, new(1, nodes, dtype=INT32), books, head_dim**-0.5, None)

    return Call(run, source="residual_vq")


CALLS = {
    "tree_attention T=1 n=4096": attend_to_tree(1, 4096),
    "tree_attention T=16 n=4096": attend_to_tree(16, 4096),
    "tree_attention T=64 n=4096": attend_to_tree(64, 4096),
    "tree_attention T=1 n=131072": attend_to_tree(1, 131072),
    "tree_attention pages, window, softcap": attend_to_tree(64, 4096, window=1000, softcap=30.0, page=16),
    "tree_attention D=64 fp32": attend_to_tree(16, 4096, FP32, 8, 4, 64),
    "tree_attention D=128 fp32": attend_to_tree(16, 4096, FP32),
    "linear bf16 14336x4096": project(16, 14336, 4096),
    "linear bf16 128256x4096": project(16, 128256, 4096, out_dtype=BF16),
    "linear fp32 4096x4096": project(16, 4096, 4096, FP32),
    "linear int8 14336x4096": project(16, 14336, 4096, BYTES),
    "linear int8 128256x4096": project(16, 128256, 4096, BYTES, BF16),
    "row_statistics 16x128256": read_statistics(16, 128256),
    "gear 2 bits, rank 4, 2 outliers n=32768": attend_to_records(1, 32768, GearFormat(2, 64, rank=4, outliers=2)),
    "gear 2 bits n=32768": attend_to_records(1, 32768, GearFormat(2, 64)),
    "gear 4 bits n=32768": attend_to_records(1, 32768, GearFormat(4, 128)),
    "gear 8 bits n=32768": attend_to_records(1, 32768, GearFormat(8, 128)),
    "gear 3 bits D=96 n=4096": attend_to_records(1, 4096, GearFormat(3, 32, outliers=4), head_dim=96),
    "gear 64 channels n=4096": attend_to_records(1, 4096, GearFormat(2, 64, rank=4, outliers=2, key_channels=64)),
    "block_masked_attention D=64": attend_to_blocks(4, 32, 16384, 64),
    "block_masked_attention D=128": attend_to_blocks(4, 32, 16384, 128),
    "block_masked_attention D=256": attend_to_blocks(4, 8, 16384, 256),
    "block_masked_attention D=64 fp32": attend_to_blocks(1, 32, 4096, 64, FP32),
    "merge_attention": merge(512, 128),
    "rms_norm": normalise(16, 4096),
    "rotary_write": write_keys(16),
    "swiglu": Call(lambda: swiglu(new(16, 2 * 14336, dtype=FP32), BF16)),
    "topk 16x128256 k=64": select(16, 128256, 64, FP32),
    "topk 256x65536 fp16 k=256": select(256, 65536, 256, FP16),
    "topk 256x65536 fp16 k=256 in 512 buckets": select(256, 65536, 256, FP16, 512),
    "selective_state Mamba-2 2.7B T=8 after 4": advance(8, 4, 80, 5120, 1, 128),
    "selective_state Mamba 370M T=8 after 4": advance(8, 4, 2048, 2048, 1, 16, per_state=True),
    "causal_conv Mamba-2 2.7B T=8 after 4": convolve(8, 4, 5376),
    "residual_vq 8x256 n=4096": attend_to_codes(1, 4096, 8, 256),
    "residual_vq 8x256 n=32768": attend_to_codes(1, 32768, 8, 256),
}


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
    """tests/helpers/cuda_on_host.py, where the bindings and the launches of C++ kernels run."""
    sys.path.append(str(ROOT))
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
