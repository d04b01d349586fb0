"""How fast is tree_attention, against what a user would call instead?

    python bench/bench_tree_attention.py            a table, bench/results/tree_attention_<device>.{json,png}
    pytest bench --benchmark-only                   the kernels alone, to compare before and after a change

Peers: torch's scaled_dot_product_attention with the dense mask (boolean, and already turned into a float bias, which
is its faster form) and FlexAttention compiled with its own block mask. On a GPU also flash-attn where it is installed,
which takes no mask of a tree: it is given a chain of as many nodes, which one node is. The floor is the larger of the
bytes of K and V over the measured read bandwidth and the operations over the measured rate of a large matrix product;
the share of either is printed. Keys and values of short prefixes stay in the last cache, which is read faster.

PYSPEC_ISA=avx2 stands for a machine with AVX2 alone; ATEN_CPU_CAPABILITY=avx2, ONEDNN_MAX_CPU_ISA=AVX2 and
MKL_ENABLE_INSTRUCTIONS=AVX2 make torch one of the same kind.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from command_line import parse, parser_of
from torch.nn.functional import scaled_dot_product_attention

from pyspec import DraftTree, measure
from pyspec.ops import tree_attention
from pyspec.runners import flash_attn

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SHAPES = ((1, 2048), (8, 2048), (16, 4096), (64, 4096))  # nodes, committed keys
ROTATED_BYTES = 256_000_000
TARGETS = {  # from the project's plan: at least this many times faster than the dense mask
    (8, 2048, "bfloat16"): 3.0,
    (8, 2048, "float32"): 3.0,
    (16, 4096, "bfloat16"): 2.5,
    (16, 4096, "float32"): 2.5,
    (64, 4096, "bfloat16"): 1.7,
}
TARGETS_AVX2 = {
    (8, 2048, "bfloat16"): 2.1,
    (8, 2048, "float32"): 2.1,
    (16, 4096, "bfloat16"): 1.65,
    (16, 4096, "float32"): 2.1,
    (64, 4096, "bfloat16"): 1.25,
    (64, 4096, "float32"): 1.65,
}


class Problem:
    """One verification: a random tree of `nodes` over `prefix` committed keys, batch 1."""

    def __init__(self, nodes: int, prefix: int, dtype: torch.dtype, device: str = "cpu"):
        generator = torch.Generator().manual_seed(nodes + prefix)
        parents = [-1] + [int(torch.randint(0, node, (1,), generator=generator)) for node in range(1, nodes)]
        self.nodes, self.prefix, self.dtype = nodes, prefix, dtype
        generator = torch.Generator(device).manual_seed(nodes + prefix)
        shapes = [(1, heads, rows, HEAD_DIM) for heads, rows in ((HEADS, nodes), *[(KV_HEADS, prefix + nodes)] * 2)]
        self.q, self.k, self.v = (torch.randn(s, generator=generator, device=device).to(dtype) for s in shapes)
        self.bits = torch.from_numpy(DraftTree([0] * nodes, parents).ancestor_bits)[None].to(device)
        self.prefix_lens = torch.tensor([prefix], dtype=torch.int32, device=device)
        index = torch.arange(nodes, device=device)
        self.ancestors = (self.bits[0][:, index // 32] >> (index % 32)) & 1 == 1
        self.mask = torch.cat([torch.ones(nodes, prefix, dtype=torch.bool, device=device), self.ancestors], 1)
        self.bias = torch.zeros(self.mask.shape, dtype=dtype, device=device).masked_fill(~self.mask, -torch.inf)

    def pyspec(self) -> torch.Tensor:
        return tree_attention(self.q, self.k, self.v, self.bits, self.prefix_lens)

    def sdpa(self, mask: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(self.q, self.k, self.v, mask, enable_gqa=True)

    def flex(self) -> Callable[[Problem], torch.Tensor]:
        """FlexAttention compiled for problems of this tree; building the mask is not counted."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        ancestors, prefix, nodes = self.ancestors, self.prefix, self.nodes

        def visible(b, h, row, key):
            return (key < prefix) | ancestors[row, (key - prefix).clamp(0, nodes - 1)]

        mask = create_block_mask(visible, None, None, nodes, prefix + nodes, device=self.q.device.type)
        torch.compiler.reset()  # a second shape would be compiled with dynamic sizes, which the CPU backend cannot
        compiled = torch.compile(flex_attention, dynamic=False)
        return lambda problem: compiled(problem.q, problem.k, problem.v, block_mask=mask, enable_gqa=True)

    def check(self) -> None:
        """Refuses to time a wrong result."""
        expected = scaled_dot_product_attention(
            self.q.double(), self.k.double(), self.v.double(), self.mask, enable_gqa=True
        )
        tolerance = 2e-2 if self.dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(self.pyspec().double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("nodes, prefix", SHAPES)
def test_tree_attention(benchmark, nodes, prefix, dtype):
    problem = Problem(nodes, prefix, dtype)
    problem.check()
    benchmark(problem.pyspec)


def run(device: str, with_flex: bool, dtypes=(torch.bfloat16, torch.float32)) -> dict:
    bandwidth = measure.read_bandwidth(device)
    rows: list[dict] = []
    result = {
        "machine": measure.machine(),
        "device": device,
        "heads": HEADS,
        "kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "read_gb_s": bandwidth / 1e9,
        "rows": rows,
    }
    targets = {} if device != "cpu" else TARGETS_AVX2 if os.environ.get("PYSPEC_ISA") == "avx2" else TARGETS
    for dtype in dtypes:
        rate = measure.multiply_rate(dtype, device)
        for nodes, prefix in SHAPES:
            problem = Problem(nodes, prefix, dtype, device)
            problem.check()
            calls = {
                "pyspec": Problem.pyspec,
                "sdpa": lambda p: p.sdpa(p.mask),
                "sdpa, float mask": lambda p: p.sdpa(p.bias),
            }
            if flash_attn.why_not(dtype, problem.q.device) is None:
                calls["flash-attn, a chain"] = lambda p: flash_attn.attention(p.q, p.k, p.v)
            if with_flex:
                try:
                    calls["flex"] = problem.flex()
                    calls["flex"](problem)
                except Exception as error:  # a peer that cannot run is a result too
                    print(f"FlexAttention does not run here: {type(error).__name__}: {str(error).splitlines()[0]}")
                    calls.pop("flex", None)
            ms = milliseconds(calls, problem, device)
            bytes_floor = 1e3 * 2 * problem.k.nbytes / bandwidth
            rate_floor = 1e3 * 4 * HEADS * nodes * (prefix + nodes) * HEAD_DIM / rate
            name = measure.name_of(dtype)
            rows.append(
                {
                    "dtype": name,
                    "nodes": nodes,
                    "prefix": prefix,
                    "ms": ms,
                    "floor_ms": max(bytes_floor, rate_floor),
                    "floor": "bytes" if bytes_floor > rate_floor else "operations",
                    "share_of_bandwidth": bytes_floor / ms["pyspec"],
                    "share_of_rate": rate_floor / ms["pyspec"],
                    "target": targets.get((nodes, prefix, name)),
                }
            )
            show(rows[-1])
            measure.save(f"tree_attention_{device}", result)
    return result


def milliseconds(calls: dict[str, Callable], problem: Problem, device: str) -> dict[str, float]:
    """Of one call each, in turn; on a GPU in a graph, over keys that its cache cannot hold."""
    if device == "cpu":
        seconds = measure.in_turn({name: lambda call=call: call(problem) for name, call in calls.items()})
        return {name: 1e3 * value for name, value in seconds.items()}
    count = max(2, ROTATED_BYTES // (2 * problem.k.nbytes))
    problems = [Problem(problem.nodes, problem.prefix, problem.dtype, device) for _ in range(count)]
    graphs = {
        name: measure.replayed([lambda call=call, p=p: call(p) for p in problems]) for name, call in calls.items()
    }
    return {name: 1e3 * value / count for name, value in measure.in_turn(graphs).items()}


def show(row: dict) -> None:
    ours = row["ms"]["pyspec"]
    peers = "  ".join(f"{name} {t:.2f} ({t / ours:.2f}x)" for name, t in row["ms"].items() if name != "pyspec")
    target = f"  target {row['target']}x" if row["target"] else ""
    print(
        f"{row['dtype']:>8} T={row['nodes']:<3} n={row['prefix']:<5} pyspec {ours:.2f} ms  {peers}  "
        f"floor {row['floor_ms']:.2f} ms by {row['floor']} ({row['share_of_rate']:.0%} of the rate, "
        f"{row['share_of_bandwidth']:.0%} of the bandwidth){target}",
        flush=True,
    )


def plot(result: dict, path) -> None:
    plt = measure.pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axis, dtype in zip(axes, ("bfloat16", "float32"), strict=True):
        rows = [row for row in result["rows"] if row["dtype"] == dtype]
        if not rows:
            continue
        peers = [name for name in rows[0]["ms"] if name != "pyspec"]
        width = 0.8 / len(peers)
        for i, peer in enumerate(peers):
            ratios = [row["ms"][peer] / row["ms"]["pyspec"] if peer in row["ms"] else 0 for row in rows]
            bars = axis.bar([x + i * width for x in range(len(rows))], ratios, width, label=peer)
            axis.bar_label(bars, fmt="%.1f", fontsize=7)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(
            [x + 0.4 - width / 2 for x in range(len(rows))], [f"{r['nodes']} nodes\n{r['prefix']} keys" for r in rows]
        )
        axis.set_title(dtype)
    axes[0].set_ylabel("time of the peer over time of tree_attention")
    axes[0].legend(fontsize=8)
    what = f"tree_attention, {HEADS} query and {KV_HEADS} KV heads of {HEAD_DIM}"
    measure.save_figure(figure, what, result, path)


def main() -> None:
    parser = parser_of(__doc__, devices=True)
    parser.add_argument(
        "--no-flex", action="store_true", help="leave out FlexAttention, which takes minutes to compile"
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    options = parse(parser)
    result = run(options.device, not options.no_flex, [DTYPES[name] for name in options.dtypes])
    path = measure.save(f"tree_attention_{options.device}", result)
    plot(result, path.with_suffix(".png"))
    print(f"wrote {path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
