"""What Triton compiles for GPUs that are not there: resources, inner loops and the order of sums."""

import re
import subprocess
from pathlib import Path

import torch
import triton

from tests.helpers.slow import slow

ARCHITECTURES = [80, 90, 100]
EACH_ARCHITECTURE = [slow(80), 90, slow(100)]
SHARED_LIMIT = 99 * 1024  # bytes a block may have on every GPU since Ampere
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # on those that are compiled for
REGISTERS = 65536  # of a multiprocessor
TENSOR_CORES = {80: r"mma\.sync\S*\.f32\.bf16\.bf16\.f32", 90: r"wgmma\.mma_async\S*\.bf16", 100: r"tcgen05\.mma\S*f16"}
ELEMENT = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}


def resources(compiled, folder: Path) -> dict[str, int]:
    """What cuobjdump says: REG, STACK, SHARED, LOCAL."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def programs_at_a_time(compiled, used: dict[str, int]) -> int:
    """How many of a kernel's programs the registers of a multiprocessor are enough for."""
    return REGISTERS // (used["REG"] * 32 * compiled.metadata.num_warps)


def hot_loops(compiled, folder: Path) -> list[str]:
    """The machine code of each innermost loop, in order: of those of over 100 instructions, which do not only wait."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([tool, "--dump-sass", cubin], capture_output=True, text=True, check=True).stdout
    code = [(int(place, 16), line) for place, line in re.findall(r"/\*([0-9a-f]{4,5})\*/ +(.*?);", text)]
    jumps = [(place, re.search(r"\bBRA\b.* (0x[0-9a-f]+) *$", line)) for place, line in code]
    loops = [(int(jump[1], 16), place) for place, jump in jumps if jump and place - int(jump[1], 16) > 100 * 16]
    inner = [loop for loop in loops if not any(loop != (a, b) and loop[0] <= a and b <= loop[1] for a, b in loops)]
    return ["\n".join(line for place, line in code if first <= place <= last) for first, last in sorted(inner)]


def arithmetic(compiled) -> list[str]:
    """The floating-point dots and reductions with the layouts that fix their order of summation."""
    text = compiled.asm["ttgir"]
    layouts = dict(
        re.findall(r"^(#\w+) = (#(?:ttg|ttng)\.(?:blocked|nvidia_mma|linear|tensor_memory)\w*<.*>)$", text, re.M)
    )
    found = []
    dots = r"^.*(?:tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma) .*$"
    for line in re.findall(dots + r"|^ *}\) : \(tensor<.*xf32.*$", text, re.M):
        operation = re.sub(r" loc\(.*|, mutable|(?<=#shared)\d+", "", line).split(" : ")[
            -1
        ]  # where an operand lies: any
        found.append(re.sub(r"#\w+", lambda name: layouts.get(name[0], name[0]), operation))
    return found
