"""What a kernel's machine code tells: what it takes of a multiprocessor, and what its loops issue.

Read from a cubin with the cuobjdump that comes with Triton.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import triton

__all__ = ["Code", "blocks_at_a_time", "functions"]

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TENSOR_CORES = r"\b(HMMA|IMMA|HGMMA|IGMMA|UTCHMMA|UTCIMMA|UTCQMMA)\b"
INTEGERS = r"(IADD3|IMAD|LOP3|SHF|LEA|ISETP|SEL|PRMT|IABS|IMNMX|VIMNMX|VIADD|I2FP|PLOP3|BMSK|LOP)\b"
SPINNING = r"\bATOMS?\.\S*(CAS|SPIN)"  # one lane after the other, each until nobody comes between
SHORTEST_LOOP = 16  # instructions: what only waits is shorter
SHARED_OF = {80: 164, 90: 228, 100: 228}  # KB of a multiprocessor
RESERVED_SHARED = 1024  # bytes of each block


@dataclass(frozen=True)
class Code:
    """A kernel's machine code for one GPU, each line at its address."""

    registers: int
    stack: int
    static_shared: int
    lines: dict[int, str]

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, "\n".join(self.lines.values())))

    def loads(self) -> dict[int, int]:
        """How many loads from global memory there are, by the bytes that each thread loads."""
        found = Counter()
        for line in self.lines.values():
            if load := re.search(r"\b(?:LDG|LDGSTS)\.(\S*)", line):
                width = re.search(r"\b(?:[US](8|16)|(64|128|256))\b", load[1])
                found[int(next(filter(None, width.groups()))) // 8 if width else 4] += 1
        return dict(sorted(found.items()))

    @cached_property
    def tiles(self) -> list[Code]:
        """The smallest loops around what a kernel is for: tensor cores, else loads, else anything. In order."""
        ends = {}  # of each loop, by where it begins
        for place, line in self.lines.items():
            jump = re.search(r"\bBRA\b.* (0x[0-9a-f]+) *$", line)
            if jump and place - int(jump[1], 16) >= SHORTEST_LOOP * 16:
                ends[int(jump[1], 16)] = place
        loops = [
            Code(self.registers, 0, 0, {place: line for place, line in self.lines.items() if first <= place <= last})
            for first, last in sorted(ends.items())
        ]
        for wanted in (TENSOR_CORES, r"\b(LDG|LDGSTS|UBLKCP|UTMALDG)\b", ""):
            if found := [loop for loop in loops if loop.count(wanted)]:
                spans = [(min(loop.lines), max(loop.lines)) for loop in found]
                return [
                    loop
                    for loop, (first, last) in zip(found, spans, strict=True)
                    if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in spans)
                ]
        return []

    def without_tiles(self) -> Code:
        spans = [range(min(tile.lines), max(tile.lines) + 1) for tile in self.tiles]
        outside = {at: line for at, line in self.lines.items() if not any(at in span for span in spans)}
        return Code(self.registers, self.stack, self.static_shared, outside)

    def clocks(self) -> dict[str, float]:
        """For each pipe of an H100's multiprocessor, how long one warp keeps it busy, when each line runs once.

        As if each lane asked shared memory for another word; a word that several ask for costs less.
        """
        busy = Counter(issue=0.0)
        for line in self.lines.values():
            busy["issue"] += 1 / 4
            name = re.sub(r"^@!?U?P\w+ ", "", line)
            if re.match(r"(MUFU|F2I|I2F|F2F|FRND|POPC|FLO)\b", name):
                busy["special"] += 2  # 16 lanes a clock
            elif re.match(INTEGERS, name):
                busy["integers"] += 1 / 2
            elif product := re.match(r"(HMMA|IMMA)\.(\d+)", name):
                size = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "16832": 16 * 8 * 32, "16864": 16 * 8 * 64}[
                    product[2]
                ]
                busy["tensor cores"] += size / (1024 if product[1] == "HMMA" else 2048)
            elif product := re.match(r"[HI]GMMA\.(\d+)x(\d+)x(\d+)", name):
                busy["tensor cores"] += int(product[1]) * int(product[2]) * int(product[3]) / 4 / 2048  # of 4 warps
            elif re.search(SPINNING, name):
                busy["shared memory"] += 100
            elif shared := re.match(r"(LDS|STS|LDSM|STSM|ATOMS|LDGSTS|SHFL)\b(\S*)", name):
                width = re.search(r"\b(64|128)\b", shared[2])
                wide = int(shared[2][-1]) if re.search(r"M8\S*\.[24]$", shared[2]) else 1
                busy["shared memory"] += int(width[1]) / 32 if width else wide
        return dict(busy)


def functions(cubin: bytes) -> dict[str, Code]:
    """The kernels of a cubin, by their names there."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    used = {}
    for name, text in re.findall(r"Function ([^\s:]+):\s*\n?\s*(REG:.*)", usage):
        used[name] = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    found = {}
    for part in code.split("Function : ")[1:]:
        name = part.split("\n", 1)[0].strip()
        lines = {int(place, 16): line for place, line in re.findall(r"/\*([0-9a-f]{4,5})\*/ +(.*?) *;", part)}
        size = used[name]
        found[name] = Code(size["REG"], size["STACK"] + size["LOCAL"], size["SHARED"], lines)
    return found


def blocks_at_a_time(code: Code, threads: int, dynamic_shared: int, architecture: int) -> int:
    """Blocks that a multiprocessor has room for: registers, shared memory and threads."""
    warps = -(-threads // 32)
    warp_registers = -(-code.registers * 32 // 256) * 256
    by_registers = 65536 // warp_registers // 4 * 4 // warps
    by_shared = SHARED_OF[architecture] * 1024 // (code.static_shared + dynamic_shared + RESERVED_SHARED)
    return min(by_registers, by_shared, 2048 // threads, 32)
