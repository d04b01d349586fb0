"""What one step costs: the plain step against the bytes it must read, trees against the plain step, Python's share."""

from __future__ import annotations

import torch
from inside import seconds_in_ops, weight_bytes

from pyspec import measure
from pyspec.generate import generate
from pyspec.runners.attention import AttentionRunner
from pyspec.tree import DraftTree

CONTEXT = 512  # tokens before the step
SIZES = (1, 2, 4, 8, 16, 32, 64)  # nodes
GOALS = {"over the floor": 1.25, 8: 1.2, 16: 1.5, 32: 2.8}  # at most; of bf16, from the project's plan
OVERHEAD_GOAL = 0.10


def steps(model: AttentionRunner, repeats: int = 21) -> dict:
    """Medians of verify(T) behind CONTEXT tokens, and the floor: bytes of weights and cache over read bandwidth."""
    device = model.device.type
    model.prefill([[place % model.vocab_size for place in range(CONTEXT)]], capacity=CONTEXT + max(SIZES))
    config = model.config
    weights = weight_bytes(model)
    cache = 2 * config.layers * config.kv_heads * CONTEXT * config.head_dim * model.dtype.itemsize

    def step(nodes: int):
        tree = tree_of(nodes)
        return lambda: model.verify({0: tree})

    bandwidth = measure.read_bandwidth(device)
    seconds = measure.in_turn({nodes: step(nodes) for nodes in SIZES}, repeats=repeats)
    bandwidth = max(bandwidth, measure.read_bandwidth(device))  # it drifts: the better of before and after
    floor = (weights + cache) / bandwidth
    return {
        "context": CONTEXT,
        "weight_bytes": weights,
        "cache_bytes": cache,
        "bytes_per_second": bandwidth,
        "floor_seconds": floor,
        "plain_over_floor": seconds[1] / floor,
        "seconds": {str(nodes): seconds[nodes] for nodes in SIZES},
        "over_plain": {str(nodes): seconds[nodes] / seconds[1] for nodes in SIZES},
        "multiply_rate_fp32": measure.multiply_rate(torch.float32, device),
        "overhead_share": overhead_share(model) if device == "cpu" else None,  # a GPU's ops return before they are done
    }


def tree_of(nodes: int) -> DraftTree:
    return DraftTree([0] * nodes, [(node - 1) // 3 if node else -1 for node in range(nodes)])


def overhead_share(model: AttentionRunner, new_tokens: int = 64) -> float:
    """The share of plain decoding, behind a short prompt, outside of ops: Python, dispatch, acceptance, bookkeeping."""
    prompt = [1] * 8
    generate(model, prompt, drafter=None, max_new_tokens=4)
    with seconds_in_ops() as inside:
        stats = generate(model, prompt, drafter=None, max_new_tokens=new_tokens).stats
    return 1 - inside() / stats.total_seconds


def show(console, found: dict, has_goals: bool) -> None:
    """Prints what `steps` found; the goals are those of the demo model in bf16 on the CPU."""
    columns = ("nodes", "ms", "over the plain step", "goal")
    table = measure.new_table(*columns, left=0, title=f"verify behind {CONTEXT} tokens")
    for nodes in SIZES:
        goal = f"at most {GOALS[nodes]}x" if has_goals and nodes in GOALS else ""
        cells = (f"{found['seconds'][str(nodes)] * 1e3:.1f}", f"{found['over_plain'][str(nodes)]:.2f}x", goal)
        table.add_row(str(nodes), *cells)
    console.print(table)
    goal = f" (goal: at most {GOALS['over the floor']}x)" if has_goals else ""
    megabytes, rate = (found["weight_bytes"] + found["cache_bytes"]) / 1e6, found["bytes_per_second"] / 1e9
    console.print(
        f"floor {found['floor_seconds'] * 1e3:.1f} ms: {megabytes:.0f} MB at {rate:.1f} GB/s; the plain "
        f"step is {found['plain_over_floor']:.2f}x that{goal}; "
        f"fp32 products reach {found['multiply_rate_fp32'] / 1e9:.0f} GFLOP/s here"
    )
    if found["overhead_share"] is not None:
        console.print(
            f"Python and dispatch: {found['overhead_share']:.1%} of plain decoding (goal: at most {OVERHEAD_GOAL:.0%})"
        )
