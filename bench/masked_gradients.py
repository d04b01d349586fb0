"""Is the backward of block_masked_attention as much faster than torch's under a dense mask as its forward is?

    python bench/bench_block_masked_attention.py --backward                   # the CPU
    python bench/bench_block_masked_attention.py --backward --device cuda

Gradients of q, k and v alone; each call's forward has been before. Prints a line for each mask and each target beside
what was reached; writes bench/results/block_masked_attention_backward_<device>.json. Masks and peers are those of the
forward. FlexAttention has no backward on a CPU. The floor is five products of visible pairs, 2.5 times the forward's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch._functorch.config as functorch
from bench_block_masked_attention import (
    ALL,
    HEAD_DIM,
    PATTERNS,
    PLANS,
    Problem,
    both,
    reached,
    show,
    show_targets,
    time_flex,
    timed,
)
from torch.nn.functional import scaled_dot_product_attention

from pyspec import measure

TARGETS = {  # as in PLANS
    "cpu": both(5, 5, "window", "ms", "sdpa")
    | both(5, 5, "documents", "ms", "sdpa")
    | both(0.9, 0.9, "causal", "ms", "sdpa causal"),
    "cuda": {(ALL, "bfloat16", "ms", "flex"): 1},
}


class Gradients(Problem):
    """The backward of one attention under one mask."""

    def __init__(self, *args):
        super().__init__(*args)
        self.d_out = torch.randn_like(self.q)
        self.wanted = [tensor.requires_grad_() for tensor in (self.q, self.k, self.v)]

    def backward(self, forward: Callable) -> Callable:
        out = forward()
        return lambda: torch.autograd.grad(out, self.wanted, self.d_out, retain_graph=True)

    def pyspec(self, mask):
        return self.backward(super().pyspec(mask))

    def peers(self) -> dict[str, Callable]:
        return {name: self.backward(call) for name, call in super().peers().items()}

    def flex(self) -> tuple[Callable, Callable]:
        functorch.donated_buffer = False  # each forward is timed with many backwards
        attend, build = super().flex()
        return self.backward(attend), build

    def check(self) -> None:
        """Refuses to time a wrong result: one head's."""
        q, k, v = (tensor[:1, :1].detach().double().requires_grad_() for tensor in self.wanted)
        out = scaled_dot_product_attention(q, k, v, self.dense)
        expected = torch.autograd.grad(out, (q, k, v), self.d_out[:1, :1].double())
        tolerance = 2e-2 if self.dtype == torch.bfloat16 else 1e-4
        for name, call in self.ours().items():
            for mine, wanted in zip(call(), expected, strict=True):
                near = tolerance * max(1.0, float(wanted.abs().max()))
                torch.testing.assert_close(
                    mine[:1, :1].double(), wanted, atol=near, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
                )

    def floor(self, rate: float, bandwidth: float) -> float:
        operations = 10 * self.q.shape[:2].numel() * HEAD_DIM * int(self.dense.sum())
        moved = 4 * self.q.nbytes + 4 * self.k.nbytes
        return 1e3 * max(operations / rate, moved / bandwidth)


def run(device: str, sizes: Sequence[int], with_flex: bool, seconds: float, patterns: Sequence[str] = PATTERNS) -> dict:
    plan, bandwidth = PLANS[device], measure.read_bandwidth(device)
    if with_flex and device == "cpu":
        print("FlexAttention has no backward on a CPU: left out")
        with_flex = False
    result = {"machine": measure.machine(), "device": device, "batch": plan.batch, "heads": plan.heads, "rows": []}
    for dtype in plan.dtypes:
        rate = measure.multiply_rate(dtype, device)
        for size in sizes:
            for pattern in patterns:
                problem = Gradients(pattern, size, dtype, device, plan.batch, plan.heads)
                problem.check()
                row = {"pattern": pattern, "dtype": measure.name_of(dtype), "size": size}
                row |= {"density": problem.mask.density, "floor_ms": problem.floor(rate, bandwidth)}
                ours = problem.ours()
                row["ms"] = timed(ours | problem.peers(), seconds)
                result["rows"].append(row)
                if with_flex:  # after what is known without it has been kept: it compiles for long
                    measure.save(f"block_masked_attention_backward_{device}", result)
                    time_flex(row, problem, ours["pyspec"], seconds)
                show(row)
                measure.save(f"block_masked_attention_backward_{device}", result)
    result["targets"] = reached(result, TARGETS[device], plan.size, {"ms": "its backward runs"})
    return result


def main(device: str, sizes: Sequence[int], with_flex: bool, seconds: float, patterns: Sequence[str]) -> None:
    result = run(device, sizes, with_flex, seconds, patterns)
    show_targets(result["targets"])
    print(f"wrote {measure.save(f'block_masked_attention_backward_{device}', result)}")
