"""Instructions of Arm's kernels, beside those of the portable build for the same processor.

    python tests/on_arm/instructions.py            prints a table
    python tests/on_arm/instructions.py --update   and writes bench/results/arm_instructions.json

For each multiply-add of linear and tree_attention, and of the other ops for each operation that pyspec.measure counts.
A plugin of qemu (counter.c) counts, for each instruction set on a processor that has no better. An emulator knows
nothing of time: fewer instructions are a reason to expect speed, not a measurement of it.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, os.getcwd())  # the repository, or the tree of links to it

import torch

from bench.instructions import small_cases
from pyspec import ops
from pyspec.tree import DraftTree
from tests.on_arm.run import HERE, PROCESSORS, ROOT, WORK, build, environment, missing

RESULT = ROOT / "bench/results/arm_instructions.json"
HEADS, KV_HEADS, HEAD_DIM, PREFIX = 8, 2, 128, 512
INPUTS, OUTPUTS = 512, 128
FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "int4": "int4"}


def linear(weight_format: torch.dtype | str, rows: int) -> int:
    """Runs it; returns its multiply-adds."""
    dtype = weight_format if weight_format in (torch.float32, torch.bfloat16) else torch.float32
    weight = ops.lay_out_weight(torch.randn(OUTPUTS, INPUTS, dtype=dtype), weight_format)
    ops.linear(torch.randn(rows, INPUTS, dtype=dtype), weight)
    return rows * INPUTS * OUTPUTS


def tree_attention(dtype: torch.dtype, nodes: int) -> int:
    """The same, for a tree with two children a node."""
    tree = DraftTree([0] * nodes, [(node - 1) // 2 if node else -1 for node in range(nodes)])
    bits, prefix = torch.from_numpy(tree.ancestor_bits)[None], torch.tensor([PREFIX], dtype=torch.int32)
    q = torch.randn(1, HEADS, nodes, HEAD_DIM, dtype=dtype)
    k, v = (torch.randn(1, KV_HEADS, PREFIX + nodes, HEAD_DIM, dtype=dtype) for _ in "kv")
    ops.tree_attention(q, k, v, bits, prefix)
    return 2 * HEADS * HEAD_DIM * int((PREFIX + 1 + torch.as_tensor(tree.depths)).sum())


FORMATS_OF = {linear: tuple(FORMATS), tree_attention: ("fp32", "bf16")}


def run() -> None:
    """What is counted. A kernel says its name and its instructions when it has run."""
    calls = {}
    for op, names in FORMATS_OF.items():
        for name in names:
            for rows in (1, 8):
                calls[f"{op.__name__}, {name}, {rows} row{'s' * (rows > 1)}"] = partial(op, FORMATS[name], rows)
    for case in small_cases():
        if case.op not in (op.__name__ for op in FORMATS_OF):
            problem = case.make("cpu")
            calls[f"{case.op}, {case.shape}"] = lambda problem=problem: (problem.call(), problem.operations)[1]
    for name, call in calls.items():
        print("begin", file=sys.stderr, flush=True)
        operations = call()
        print(f"end {name}: {operations}", file=sys.stderr, flush=True)


def count(instruction_set: str, processor_of: str, tree: Path, plugin: Path) -> dict[str, float]:
    """By case, with the kernels of an instruction set."""
    counting = environment(tree, processor_of)
    counting |= {"PYSPEC_ISA": instruction_set, "PYSPEC_COUNT": "1", "QEMU_PLUGIN": str(plugin)}
    command = [sys.executable, HERE / "instructions.py", "--run"]
    ran = subprocess.run(command, env=counting, cwd=tree, check=True, stderr=subprocess.PIPE, text=True)
    found = {}
    for text, case, operations in re.findall(r"^begin\n(.*?)^end (.*?): (\d+)$", ran.stderr, re.M | re.S):
        kernels = re.findall(r"^(pyspec_\S+) instructions (\d+)$", text, re.M)
        counted = sum(int(instructions) for kernel, instructions in kernels if "lay_out" not in kernel)
        found[case] = round(counted / int(operations), 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write them too")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        return run()
    if reason := missing():
        sys.exit(f"Arm's instructions cannot be counted here: {reason}")
    _, tree = build(portable=True)
    plugin = WORK / "counter.so"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", HERE / "counter.c", "-o", plugin], check=True)
    found = {"portable": count("portable", "neon", tree, plugin)}
    found |= {name: count(name, name, tree, plugin) for name in PROCESSORS}
    print(f"{'':72}", *(f"{name:>16}" for name in found))
    for case, portable in found["portable"].items():
        ratios = (f"{by_case[case]:.3f} ({portable / by_case[case]:.1f}x)" for by_case in found.values())
        print(f"{case:72}", *(f"{ratio:>16}" for ratio in ratios))
    if options.update:
        RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
