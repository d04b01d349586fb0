"""Instructions per multiply-add of Arm's kernels, beside those of the portable build for the same processor.

    python tests/on_arm/instructions.py            prints a table
    python tests/on_arm/instructions.py --update   and writes bench/results/arm_instructions.json

Counted by a plugin of qemu (counter.c), for each instruction set on a processor that has no better. An emulator knows
nothing of time: fewer instructions are a reason to expect speed, not a measurement of it.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, os.getcwd())  # the repository, or the tree of links to it

import torch

from pyspec import ops
from pyspec.tree import DraftTree
from tests.on_arm.run import HERE, PROCESSORS, ROOT, WORK, build, environment, missing

RESULT = ROOT / "bench/results/arm_instructions.json"
HEADS, KV_HEADS, HEAD_DIM, PREFIX = 8, 2, 128, 512
INPUTS, OUTPUTS = 512, 128
FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "int4": "int4"}
CASES = [(op, name, rows) for op in ("linear", "tree_attention") for name in FORMATS for rows in (1, 8)]


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


def run() -> None:
    """What is counted. A kernel says its name and its instructions when it has run."""
    for op, name, rows in CASES:
        if (op, name) in (("tree_attention", "int8"), ("tree_attention", "int4")):
            continue
        print("begin", file=sys.stderr, flush=True)
        products = (linear if op == "linear" else tree_attention)(FORMATS[name], rows)
        print(f"end {op}, {name}, {rows} row{'s' * (rows > 1)}: {products}", file=sys.stderr, flush=True)


def count(instruction_set: str, processor_of: str, tree: Path, plugin: Path) -> dict[str, float]:
    """By case, with the kernels of an instruction set."""
    counting = environment(tree, processor_of)
    counting |= {"PYSPEC_ISA": instruction_set, "PYSPEC_COUNT": "1", "QEMU_PLUGIN": str(plugin)}
    command = [sys.executable, HERE / "instructions.py", "--run"]
    ran = subprocess.run(command, env=counting, cwd=tree, check=True, stderr=subprocess.PIPE, text=True)
    found = {}
    for text, case, op, products in re.findall(r"^begin\n(.*?)^end ((\w+).*?): (\d+)$", ran.stderr, re.M | re.S):
        kernels = re.findall(rf"^pyspec_{op}_\S+ instructions (\d+)$", text, re.M)
        found[case] = round(int(kernels[-1]) / int(products), 3)
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
    _, tree = build()
    plugin = WORK / "counter.so"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", HERE / "counter.c", "-o", plugin], check=True)
    found = {"portable": count("portable", "neon", tree, plugin)}
    found |= {name: count(name, name, tree, plugin) for name in PROCESSORS}
    print(f"{'':32}", *(f"{name:>16}" for name in found))
    for case, portable in found["portable"].items():
        ratios = (f"{by_case[case]:.3f} ({portable / by_case[case]:.1f}x)" for by_case in found.values())
        print(f"{case:32}", *(f"{ratio:>16}" for ratio in ratios))
    if options.update:
        RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
