"""How fast is block_masked_attention, against what a user would call instead, and what does each idea of it bring?

    python bench/bench_block_masked_attention.py    what the plan asks for: some ten minutes on two cores
    python bench/bench_block_masked_attention.py --sizes 256 1024 4096 16384    also other N, for the figure
    pytest bench --benchmark-only                   the kernel alone, to compare before and after a change

Prints tables and each target beside what was reached; writes bench/results/block_masked_attention_<device>.{json,png}.

Masks: mask_patterns.py. Peers: torch's scaled_dot_product_attention with the dense mask and, unmasked, causal or full;
FlexAttention compiled with its own block mask; a call for each document where documents are joined; on a GPU flash-attn
where it is installed and has the mask (causal, all ones, window, documents). Kernel and mask building are timed apart.
Variants: "base" reads the mask of every tile that has something, "dense run" not of the first run of full tiles in a
row; those are the paper's. Ours lists all full tiles. The floor is the operations of visible pairs over the rate of a
large matrix product, or the bytes of q, k, v and out over the read bandwidth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from command_line import parse, parser_of
from mask_figure import draw
from mask_patterns import PATTERNS, as_variant, builder, document_length, predicate, random_tiles, window_of
from torch.nn.functional import scaled_dot_product_attention

from pyspec import BlockMask, measure
from pyspec.ops import block_masked_attention
from pyspec.runners import flash_attn

HEAD_DIM = 64
TREE_NODES, TREE_PREFIX = 64, 2048  # of one round of speculation
SHARES = (0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0)  # of tiles, for the line through the origin
ALL = "every mask"


@dataclass(frozen=True)
class Plan:
    """What the plan asks of a device. Targets: (pattern, dtype, "ms" or "build_ms", peer): how many times faster."""

    batch: int
    heads: int
    size: int
    dtypes: tuple[torch.dtype, ...]
    targets: dict[tuple[str, str, str, str], float]
    most_build_ms: float | None = None


def both(fp32: float, bf16: float, *key: str) -> dict[tuple[str, str, str, str], float]:
    pattern, kind, peer = key
    return {(pattern, "float32", kind, peer): fp32, (pattern, "bfloat16", kind, peer): bf16}


PLANS = {
    "cpu": Plan(
        batch=1,
        heads=8,
        size=4096,
        dtypes=(torch.float32, torch.bfloat16),
        targets=both(12, 20, "window", "ms", "sdpa")
        | both(8, 8, "dilated", "ms", "sdpa")
        | both(6, 6, "global", "ms", "sdpa")
        | both(10, 10, "documents", "ms", "sdpa")
        | both(3, 3, "tree", "ms", "sdpa")
        | both(10, 10, "sparse", "ms", "sdpa")
        | both(0.95, 1.3, "causal", "ms", "sdpa causal")
        | both(0.95, 1.3, "all ones", "ms", "sdpa full")
        | both(1, 1, ALL, "ms", "flex")
        | both(1.5, 3, "window", "ms", "flex")
        | both(1.5, 3, "documents", "ms", "flex")
        | {(ALL, "float32", "build_ms", "flex"): 20},
    ),
    "cuda": Plan(
        batch=4,
        heads=32,
        size=16384,
        dtypes=(torch.bfloat16,),
        targets={
            ("documents", "bfloat16", "ms", "sdpa causal"): 4,
            ("window", "bfloat16", "ms", "sdpa full"): 12,
            (ALL, "bfloat16", "ms", "flex"): 1,
        },
        most_build_ms=0.5,
    ),
}


class Problem:
    """One attention under one mask."""

    def __init__(
        self, pattern: str, size: int, dtype: torch.dtype, device: str = "cpu", batch: int = 1, heads: int = 8
    ):
        self.pattern, self.size, self.dtype, self.device = pattern, size, dtype, device
        self.build = builder(pattern, size, device)
        self.mask = self.build()
        self.dense = self.mask.to_dense()[0, 0]
        self.sees = predicate(pattern, size, self.dense)
        generator = torch.Generator(device).manual_seed(size)
        plan, lengths = PLANS[device], (self.mask.rows, self.mask.keys, self.mask.keys)
        shapes = [(plan.batch, plan.heads, length, HEAD_DIM) for length in lengths]
        self.q, self.k, self.v = (torch.randn(s, generator=generator, device=device).to(dtype) for s in shapes)

    def pyspec(self, mask: BlockMask) -> Callable[[], torch.Tensor]:
        return lambda: block_masked_attention(self.q, self.k, self.v, mask)

    def ours(self) -> dict[str, Callable]:
        """By name: ours, the paper's variants, and where an order can help, ours in that order."""
        masks = {"pyspec": self.mask, "base": as_variant(self.mask, "base")}
        masks["dense run"] = as_variant(self.mask, "dense run")
        if self.pattern == "sparse":
            masks["pyspec"] = self.mask.permuted("rcm")
            masks["in the order given"] = self.mask
        if self.pattern == "tree":
            masks["depth first"] = self.mask.permuted()
        return {name: self.pyspec(mask) for name, mask in masks.items()}

    def peers(self) -> dict[str, Callable]:
        q, k, v = self.q, self.k, self.v
        calls = {"sdpa": lambda: scaled_dot_product_attention(q, k, v, self.dense)}
        if self.mask.rows == self.mask.keys:
            calls["sdpa causal"] = lambda: scaled_dot_product_attention(q, k, v, is_causal=True)
        calls["sdpa full"] = lambda: scaled_dot_product_attention(q, k, v)
        if self.pattern == "documents":
            parts = [tensor.split(document_length(self.size), 2) for tensor in (q, k, v)]
            calls["a call a document"] = lambda: torch.cat(
                [scaled_dot_product_attention(*one, is_causal=True) for one in zip(*parts, strict=True)], 2
            )
        return calls | self.flash_attn()

    def flash_attn(self) -> dict[str, Callable]:
        """flash-attn under a mask that it has, where it can run."""
        q, k, v = self.q, self.k, self.v
        if flash_attn.why_not(self.dtype, q.device) is not None:
            return {}
        if self.pattern == "documents":
            return {"flash-attn": flash_attn.documents(q, k, v, document_length(self.size))}
        masks = {"causal": {}, "all ones": {"causal": False}, "window": {"window": window_of(self.size)}}
        if self.pattern not in masks:
            return {}
        return {"flash-attn": lambda: flash_attn.attention(q, k, v, **masks[self.pattern])}

    def flex(self) -> tuple[Callable, Callable]:
        """FlexAttention compiled for this problem, and how it builds its mask, compiled too."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        torch.compiler.reset()  # a second shape would be compiled with dynamic sizes, which the CPU backend cannot
        create = torch.compile(create_block_mask, dynamic=False)

        def build():
            return create(self.sees, None, None, self.mask.rows, self.mask.keys, device=self.device)

        block_mask, attend = build(), torch.compile(flex_attention, dynamic=False)
        return lambda: attend(self.q, self.k, self.v, block_mask=block_mask), build

    def builds(self) -> dict[str, Callable]:
        rows, keys = self.mask.rows, self.mask.keys
        return {
            "pyspec": self.build,
            "from_dense": lambda: BlockMask.from_dense(self.dense),
            "from_predicate": lambda: BlockMask.from_predicate(self.sees, rows, keys, device=self.device),
        }

    def check(self) -> None:
        """Refuses to time a wrong result: one head's."""
        q, k, v = (tensor[:1, :1].double() for tensor in (self.q, self.k, self.v))
        expected = scaled_dot_product_attention(q, k, v, self.dense)
        tolerance = 2e-2 if self.dtype == torch.bfloat16 else 1e-4
        for name, call in self.ours().items():
            found = call()[:1, :1].double()
            torch.testing.assert_close(
                found, expected, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )

    def floor(self, rate: float, bandwidth: float) -> float:
        operations = 4 * self.q.shape[:2].numel() * HEAD_DIM * int(self.dense.sum())
        moved = 2 * self.q.nbytes + 2 * self.k.nbytes
        return 1e3 * max(operations / rate, moved / bandwidth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS[:-1])
def test_block_masked_attention(benchmark, pattern, dtype):
    problem = Problem(pattern, 1024, dtype)
    problem.check()
    benchmark(problem.pyspec(problem.mask))


# ==== measuring ====


def timed(calls: dict[str, Callable], seconds: float) -> dict[str, float]:
    """Milliseconds of each call, in turn, for about so many seconds in all."""
    return {name: 1e3 * value for name, value in measure.in_turn_for(calls, seconds).items()}


def run(device: str, sizes: Sequence[int], with_flex: bool, seconds: float, patterns: Sequence[str] = PATTERNS) -> dict:
    plan, bandwidth = PLANS[device], measure.read_bandwidth(device)
    rows: list[dict] = []
    result = {
        "machine": measure.machine(),
        "device": device,
        "batch": plan.batch,
        "heads": plan.heads,
        "head_dim": HEAD_DIM,
        "read_gb_s": bandwidth / 1e9,
        "rows": rows,
    }
    for dtype in plan.dtypes:
        rate = measure.multiply_rate(dtype, device)
        for size in sizes:
            for pattern in patterns:
                problem = Problem(pattern, size, dtype, device)
                problem.check()
                ours, peers, builds = problem.ours(), problem.peers(), problem.builds()
                row = {
                    "pattern": pattern,
                    "dtype": measure.name_of(dtype),
                    "size": size,
                    "density": problem.mask.density,
                    "ms": timed(ours | peers, seconds),
                    "build_ms": timed(builds, seconds / 4),
                    "peers": list(peers),
                    "floor_ms": problem.floor(rate, bandwidth),
                }
                rows.append(row)
                if with_flex:  # after what is known without it has been kept: it compiles for long
                    measure.save(f"block_masked_attention_{device}", result)
                    build = time_flex(row, problem, ours["pyspec"], seconds)
                    if build is not None:
                        row["build_ms"]["flex"] = timed({"flex": build}, seconds / 4)["flex"]
                        row["peers"].append("flex")
                show(rows[-1])
                measure.save(f"block_masked_attention_{device}", result)
    result["tree_build_us"] = tree_build_us(device)
    result["density"] = density_sweep(device, plan, max(sizes) * 2 if device == "cpu" else max(sizes), seconds)
    result["targets"] = targets_of(result, plan)
    return result


def time_flex(row: dict, problem: Problem, ours: Callable, seconds: float) -> Callable | None:
    """Adds FlexAttention to a row, timed in turn with ours; the call that builds its mask, None where it cannot run."""
    try:
        flex, build = problem.flex()
        ms = timed({"pyspec": ours, "flex": flex}, seconds)
    except Exception as error:  # a peer that cannot run is a result too
        print(f"FlexAttention does not run: {type(error).__name__}: {str(error).splitlines()[0]}")
        return None
    row["ms"]["flex"] = ms["flex"] * row["ms"]["pyspec"] / ms["pyspec"]
    return build


def density_sweep(device: str, plan: Plan, size: int, seconds: float) -> list[dict]:
    """Time against the share of visible tiles, which are full and anywhere: should be a line through the origin."""
    q, k, v = (torch.randn(plan.batch, plan.heads, size, HEAD_DIM, device=device, dtype=plan.dtypes[0]) for _ in "qkv")
    masks = {share: random_tiles(size, share, device) for share in SHARES}
    calls = {share: lambda m=mask: block_masked_attention(q, k, v, m) for share, mask in masks.items()}
    points = []
    for share, ms in timed(calls, seconds).items():
        points.append({"size": size, "density": masks[share].density, "ms": ms})
    whole = sum(p["ms"] * p["density"] for p in points) / sum(p["density"] ** 2 for p in points)  # least squares
    for point in points:
        point["over_line"] = point["ms"] / (whole * point["density"])
        print("N={size} {density:6.1%} of tiles: {ms:.2f} ms, {over_line:.2f} of the line".format(**point), flush=True)
    return points


def tree_build_us(device: str) -> float:
    """The mask of one round of speculation: a tree over what is committed."""
    parents = [-1] + [(node - 1) // 3 for node in range(1, TREE_NODES)]
    tree = torch.tensor(parents, dtype=torch.int32).numpy()
    build = lambda: BlockMask.from_tree(tree, TREE_PREFIX, device=device)  # noqa: E731
    return 1e6 * measure.in_turn({"tree": build}, repeats=1000, warmup=50)["tree"]


def reached(result: dict, targets: dict[tuple[str, str, str, str], float], size: int, verbs: dict[str, str]) -> list:
    """What each target is about, what was reached at that size, in its worst mask, and what was asked for."""
    found = []
    for (pattern, dtype, kind, peer), wanted in targets.items():
        rows = [row for row in result["rows"] if row["dtype"] == dtype and row["size"] == size]
        rows = [row for row in rows if pattern in (ALL, row["pattern"]) and peer in row[kind]]
        ratios = {row["pattern"]: row[kind][peer] / row[kind]["pyspec"] for row in rows}
        if not ratios:
            continue
        worst = min(ratios, key=ratios.get)
        about = f"{dtype}, {pattern if pattern != ALL else f'{ALL} (worst: {worst})'}"
        what = f"{about}: {verbs[kind]} x times as fast as {peer}"
        found.append({"what": what, "reached": ratios[worst], "wanted": wanted, "met": ratios[worst] >= wanted})
    return found


def targets_of(result: dict, plan: Plan) -> list[dict]:
    """Every figure of the plan: what it is about, what was reached and what was asked for."""
    found = reached(result, plan.targets, plan.size, {"ms": "runs", "build_ms": "built"})
    planned = [row["build_ms"]["pyspec"] for row in result["rows"] if row["size"] == plan.size]
    if plan.most_build_ms is not None and planned:
        slowest = max(planned)
        met = slowest <= plan.most_build_ms
        found.append({"what": "slowest mask, ms", "reached": slowest, "wanted": plan.most_build_ms, "met": met})
    off = max(abs(point["over_line"] - 1) for point in result["density"])
    found.append({"what": "time off the line of density, at most", "reached": off, "wanted": 0.15, "met": off <= 0.15})
    tree = result["tree_build_us"]
    what = f"mask of a tree of {TREE_NODES} nodes, us at most"
    return [*found, {"what": what, "reached": tree, "wanted": 50, "met": tree < 50}]


# ==== showing ====


def show(row: dict) -> None:
    ours = row["ms"]["pyspec"]
    print(
        f"{row['dtype']:>8} N={row['size']:<5} {row['pattern']:<9} {row['density']:6.1%} of tiles: {ours:.2f} ms, "
        f"{row['floor_ms'] / ours:.0%} of the floor; "
        + ", ".join(f"{name} {ms:.2f} ({ms / ours:.2f}x)" for name, ms in row["ms"].items() if name != "pyspec")
        + ("; built in " if "build_ms" in row else "")
        + ", ".join(f"{name} {ms:.3f}" for name, ms in row.get("build_ms", {}).items()),
        flush=True,
    )


def show_targets(targets: Sequence[dict]) -> None:
    print("\n  reached   plan")
    for target in targets:
        print(f"{target['reached']:9.2f} {target['wanted']:6g} {'' if target['met'] else 'NOT '}met: {target['what']}")


def main() -> None:
    parser = parser_of(__doc__, devices=True)
    parser.add_argument("--backward", action="store_true", help="time gradients instead: masked_gradients.py")
    parser.add_argument(
        "--sizes", type=int, nargs="+", help="N, up to 16,384 where memory allows; the plan's by default"
    )
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=list(PATTERNS))
    parser.add_argument("--seconds", type=float, default=8.0, help="to time one mask's calls for")
    parser.add_argument("--no-flex", action="store_true", help="leave out FlexAttention, which takes long to compile")
    options = parse(parser)
    sizes = options.sizes or [PLANS[options.device].size]
    if options.backward:
        import masked_gradients

        return masked_gradients.main(options.device, sizes, not options.no_flex, options.seconds, options.patterns)
    result = run(options.device, sizes, not options.no_flex, options.seconds, options.patterns)
    show_targets(result["targets"])
    path = measure.save(f"block_masked_attention_{options.device}", result)
    draw(result, path.with_suffix(".png"))
    print(f"wrote {path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
