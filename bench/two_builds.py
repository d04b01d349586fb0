"""Is this build slower than another one? Plain steps and verifies of both, in turn.

    python bench/two_builds.py OTHER          a table; OTHER is the folder of another built checkout
    python bench/two_builds.py                of this build alone: the share of a plain step outside of ops, and
                                              the median ms of 20 recordings of a verify of 8 nodes

Each build has a process of its own, because one process can register an op only once; they are asked in turn, so that
both see the same machine. Shapes: the demo model in bf16 and int8, and the shapes of Mamba-2 130M and a small Bamba
with random weights. Columns: medians in ms of this build and of the other, and the median of the ratios of neighbours.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

import pyspec
from pyspec import DraftTree
from pyspec.caches import cache_from_name

ROOT = Path(__file__).resolve().parent.parent
CASES = ("demo bf16", "demo int8", "mamba2-130m bf16", "bamba bf16", "demo bf16 gear-2bit")
SIZES = (1, 8)
TREE = DraftTree([5] * 8, [-1] + [0] * 7)
SHAPES = {
    "mamba2-130m": (
        "Mamba2",
        {"vocab_size": 50288, "hidden_size": 768, "num_hidden_layers": 24, "num_heads": 24, "head_dim": 64}
        | {"expand": 2, "n_groups": 1},
    ),
    "bamba": (
        "Bamba",
        {"vocab_size": 1000, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 24}
        | {"num_attention_heads": 8, "num_key_value_heads": 2, "attn_layer_indices": [3, 9, 15, 21]}
        | {"mamba_n_heads": 16, "mamba_d_head": 64, "mamba_d_state": 64, "mamba_n_groups": 1, "mamba_expand": 2},
    ),
}


def runner_of(case: str):
    """A runner of a build, whichever names its rooms have."""
    model, dtype = case.split()[:2]
    dtype = {"bf16": torch.bfloat16, "int8": torch.int8}[dtype]
    if model == "demo":
        return pyspec.load("demo", dtype=dtype, device="cpu")
    torch.manual_seed(0)
    kind, shape = SHAPES[model]
    config = getattr(transformers, f"{kind}Config")(**shape)
    with tempfile.TemporaryDirectory() as folder:
        getattr(transformers, f"{kind}ForCausalLM")(config).to(torch.bfloat16).save_pretrained(folder)
        return pyspec.load(folder, dtype=dtype, device="cpu")


def start_behind(runner, case: str) -> None:
    """Starts a batch of one prompt of 200 tokens, over the cache that the case names."""
    cache = {"cache": cache_from_name(case.split()[2])} if len(case.split()) == 3 else {}
    runner.prefill([list(range(1, 201))], capacity=400, **cache)


def serve() -> None:
    """Answers lines "case nodes" with the seconds of a verify behind 200 tokens."""
    torch.set_num_threads(2)
    case, runner, by_slot = None, None, True
    answers = sys.stdout
    sys.stdout = sys.stderr
    for line in sys.stdin:
        asked, nodes = line.rstrip("\n").rsplit("|", 1)
        if asked != case:
            case, runner = asked, runner_of(asked)
            start_behind(runner, case)
        tree = DraftTree([5] * int(nodes), [-1] + [0] * (int(nodes) - 1))
        times = []
        for _ in range(6):
            start = time.perf_counter()
            try:
                runner.verify({0: tree} if by_slot else [tree])
            except TypeError:
                by_slot = False
                runner.verify([tree])
            times.append(time.perf_counter() - start)
        print(min(times), file=answers, flush=True)


def show_shares(cases: Sequence[str]) -> None:
    """Prints how much of a plain step is Python, dispatch and bookkeeping, and what recording a shape takes."""
    from inside import seconds_in_ops, seconds_of_recording  # which another build may lack

    torch.set_num_threads(2)
    for case in cases:
        runner, tree = runner_of(case), DraftTree.chain([5])
        start_behind(runner, case)
        for _ in range(5):
            runner.verify({0: tree})
        with seconds_in_ops() as inside:
            start, before = time.perf_counter(), inside()
            for _ in range(40):
                runner.verify({0: tree})
            total = time.perf_counter() - start
        recording = statistics.median(seconds_of_recording(runner, TREE) for _ in range(20))
        share = 1 - (inside() - before) / total
        print(
            f"{case:24}{share:7.1%} of {total / 40 * 1e3:.2f} ms outside of ops, recorded in {recording * 1e3:.2f} ms"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, nargs="?", help="the folder of another built checkout")
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve()
    if options.other is None:
        return show_shares(options.cases)
    if not (options.other / "pyspec").is_dir():
        parser.error(f"OTHER must be the folder of a built checkout, got {options.other}")
    workers = []
    for folder in (ROOT, options.other.resolve()):
        environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "2"}
        command = [sys.executable, __file__, "--serve"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        workers.append(subprocess.Popen(command, **pipes, env=environment, text=True))

    def ask(worker, case: str, nodes: int) -> float:
        print(f"{case}|{nodes}", file=worker.stdin, flush=True)
        return float(worker.stdout.readline())

    print(f"{'case':24}{'nodes':>6}{'this ms':>10}{'other ms':>10}{'ratio':>8}")
    for case in options.cases:
        for nodes in SIZES:
            pairs = []
            for turn in range(options.rounds + 2):
                order = (0, 1) if turn % 2 else (1, 0)
                found = {which: ask(workers[which], case, nodes) for which in order}
                pairs.append((found[0], found[1]))
            ours, others = zip(*pairs[2:], strict=True)
            ratio = statistics.median(a / b for a, b in pairs[2:])
            print(
                f"{case:24}{nodes:6}{statistics.median(ours) * 1e3:10.3f}{statistics.median(others) * 1e3:10.3f}"
                f"{ratio:8.3f}"
            )
    for worker in workers:
        worker.stdin.close()


if __name__ == "__main__":
    main()
