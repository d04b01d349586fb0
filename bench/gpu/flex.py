"""Compiles FlexAttention for what later steps time, beside steps that time nothing: each call takes it half a minute.

    python bench/gpu/flex.py forward|backward|tree

What is compiled lies in the folders TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR, where those steps look for it.
"""

import sys
import time
from collections.abc import Iterator

import bench_tree_attention
import torch
from bench_block_masked_attention import PLANS, Problem
from masked_gradients import Gradients

PATTERNS, SIZE = ("documents", "causal"), 8192  # as gpu.sh asks for them


def compile_all(kind: str) -> Iterator[str]:
    """Makes each call once; says which."""
    if kind == "tree":
        for nodes, prefix in bench_tree_attention.SHAPES:
            problem = bench_tree_attention.Problem(nodes, prefix, torch.bfloat16, "cuda")
            problem.flex()(problem)
            yield f"{nodes} nodes"
    plan, make = PLANS["cuda"], {"forward": Problem, "backward": Gradients}.get(kind)
    for pattern in PATTERNS if make else ():
        attend, build = make(pattern, SIZE, torch.bfloat16, "cuda", plan.batch, plan.heads).flex()
        attend(), build()
        yield pattern


def main() -> None:
    start = time.perf_counter()
    for what in compile_all(sys.argv[1]):
        torch.cuda.synchronize()
        print(f"{what}: there after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
