"""How fast is block_masked_attention, against what a user would call instead, and what does each idea of it bring?

    python bench/bench_block_masked_attention.py    tables, bench/results/block_masked_attention_<device>.{json,png}
    pytest bench --benchmark-only                   the kernel alone, to compare before and after a change

Masks: those of the paper (Binary Block Masking, arXiv 2409.15097); nodes of a tree see all ancestors and a prefix.
Peers: torch's scaled_dot_product_attention with the dense mask and, unmasked, causal or full; FlexAttention compiled
with its own block mask; a call for each document where documents are packed. Kernel and mask building are timed apart.
Variants: "base" reads the mask of every tile that has something, "dense run" not of the first run of full tiles in a
row; those are the paper's. Ours lists all full tiles. The floor is the operations of visible pairs over the rate of a
large matrix product, or the bytes of q, k, v and out over the read bandwidth.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import measure
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from pyspec import BlockMask
from pyspec.masks import _FULL
from pyspec.ops import block_masked_attention

BATCH, HEADS, HEAD_DIM = 1, 8, 64
SIZES = (256, 1024, 4096)
PATTERNS = ("causal", "all ones", "window", "dilated", "global", "documents", "prefix-LM", "tree", "sparse")
TARGETS = {  # of the plan, at 4096: pattern: (at least this many times faster in fp32 and bf16, than what)
    "window": (12.0, 20.0, "sdpa"),
    "dilated": (8.0, 8.0, "sdpa"),
    "global": (6.0, 6.0, "sdpa"),
    "documents": (10.0, 10.0, "sdpa"),
    "tree": (3.0, 3.0, "sdpa"),
    "sparse": (10.0, 10.0, "sdpa"),
    "causal": (0.95, 1.3, "sdpa causal"),
    "all ones": (0.95, 1.3, "sdpa full"),
}


def sparse_dense(size: int) -> torch.Tensor:
    """A symmetric band that is 2% of all, in a random order that hides it."""
    generator = torch.Generator().manual_seed(size)
    back = (torch.arange(size)[:, None] - torch.arange(size)).abs()
    shuffle = torch.randperm(size, generator=generator)
    return (back <= size // 100)[shuffle][:, shuffle]


def builder(pattern: str, size: int, device: str) -> Callable[[], BlockMask]:
    """What a user calls to make the mask."""
    window = min(256, size // 4)
    if pattern == "tree":
        nodes = size // 3  # 1,365 at 4,096: a complete 4-ary tree of depth 5
        parents = [-1] + [(node - 1) // 4 for node in range(1, nodes)]
        return lambda: BlockMask.from_tree(parents, size // 2, device=device)
    if pattern == "sparse":
        dense = sparse_dense(size).to(device)
        return lambda: BlockMask.from_dense(dense)
    documents = [max(size // 16, 1)] * 16
    return {
        "causal": lambda: BlockMask.from_documents([size], device=device),
        "all ones": lambda: BlockMask.from_documents([size], causal=False, device=device),
        "window": lambda: BlockMask.from_window(size, window=window, device=device),
        "dilated": lambda: BlockMask.from_window(size, window=window // 2, dilation=2, device=device),
        "global": lambda: BlockMask.from_window(size, window=window, global_tokens=64, causal=False, device=device),
        "documents": lambda: BlockMask.from_documents(documents, device=device),
        "prefix-LM": lambda: BlockMask.from_documents(documents, inputs=[n // 2 for n in documents], device=device),
    }[pattern]


def as_variant(mask: BlockMask, variant: str) -> BlockMask:
    """The mask with full tiles made partial: all of them, or all but the first run in each row block."""
    tile_map = mask._tile_map()
    full = tile_map == _FULL
    first = full.to(torch.int8).argmax(-1, keepdim=True)
    gaps = (~full & (torch.arange(full.shape[-1], device=full.device) >= first)).cumsum(-1)
    demoted = full if variant == "base" else full & (gaps > 0)
    ones = torch.full((int(demoted.sum()), *mask.bits.shape[1:]), -1, device=mask.device)  # each reads bits of its own
    tile_map[demoted] = len(mask.bits) + torch.arange(len(ones), dtype=torch.int32, device=mask.device)
    return BlockMask._from_map(tile_map, torch.cat([mask.bits, ones]), mask.rows, mask.keys)


class Problem:
    """One attention under one mask."""

    def __init__(self, pattern: str, size: int, dtype: torch.dtype, device: str = "cpu"):
        self.pattern, self.size, self.dtype, self.device = pattern, size, dtype, device
        self.build = builder(pattern, size, device)
        self.mask = self.build()
        self.dense = self.mask.to_dense()[0, 0]
        generator = torch.Generator().manual_seed(size)
        shapes = [(BATCH, HEADS, length, HEAD_DIM) for length in (self.mask.rows, self.mask.keys, self.mask.keys)]
        self.q, self.k, self.v = (torch.randn(s, generator=generator).to(device, dtype) for s in shapes)

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
            parts = [tensor.split(max(self.size // 16, 1), 2) for tensor in (q, k, v)]
            calls["a call a document"] = lambda: torch.cat(
                [scaled_dot_product_attention(*one, is_causal=True) for one in zip(*parts, strict=True)], 2
            )
        return calls

    def flex(self) -> tuple[Callable, Callable]:
        """FlexAttention compiled for this problem, and how it builds its mask, compiled too."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        dense = self.dense

        def sees(b, h, row, key):
            return dense[row, key]

        torch.compiler.reset()  # a second shape would be compiled with dynamic sizes, which the CPU backend cannot
        create = torch.compile(create_block_mask, dynamic=False)

        def build():
            return create(sees, None, None, self.mask.rows, self.mask.keys, device=self.device)

        block_mask, attend = build(), torch.compile(flex_attention, dynamic=False)
        return lambda: attend(self.q, self.k, self.v, block_mask=block_mask), build

    def check(self) -> None:
        """Refuses to time a wrong result."""
        expected = scaled_dot_product_attention(self.q.double(), self.k.double(), self.v.double(), self.dense)
        tolerance = 2e-2 if self.dtype == torch.bfloat16 else 1e-4
        for name, call in self.ours().items():
            found = call().double()
            torch.testing.assert_close(
                found, expected, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )

    def floor(self, rate: float, bandwidth: float) -> float:
        operations = 4 * BATCH * HEADS * HEAD_DIM * int(self.dense.sum())
        moved = 2 * self.q.nbytes + 2 * self.k.nbytes
        return 1e3 * max(operations / rate, moved / bandwidth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS[:-1])
def test_block_masked_attention(benchmark, pattern, dtype):
    problem = Problem(pattern, 1024, dtype)
    problem.check()
    benchmark(problem.pyspec(problem.mask))


def run(device: str, sizes, with_flex: bool, repeats: int) -> dict:
    bandwidth = measure.read_bandwidth(device)
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        rate = measure.multiply_rate(dtype, device)
        for size in sizes:
            for pattern in PATTERNS:
                problem = Problem(pattern, size, dtype, device)
                problem.check()
                ours, peers = problem.ours(), problem.peers()
                builds = {"pyspec": problem.build}
                if with_flex:
                    try:
                        peers["flex"], builds["flex"] = problem.flex()
                        peers["flex"]()
                    except Exception as error:  # a peer that cannot run is a result too
                        print(f"FlexAttention does not run: {type(error).__name__}: {str(error).splitlines()[0]}")
                        peers.pop("flex", None)
                seconds = measure.in_turn(ours | peers, repeats, warmup=1)
                build_seconds = measure.in_turn(builds, repeats, warmup=1)
                rows.append(
                    {
                        "pattern": pattern,
                        "dtype": str(dtype).removeprefix("torch."),
                        "size": size,
                        "density": problem.mask.density,
                        "ms": {name: 1e3 * s for name, s in seconds.items()},
                        "build_ms": {name: 1e3 * s for name, s in build_seconds.items()},
                        "peers": list(peers),
                        "floor_ms": problem.floor(rate, bandwidth),
                    }
                )
                show(rows[-1])
    return {
        "machine": measure.machine(),
        "device": device,
        "batch": BATCH,
        "heads": HEADS,
        "head_dim": HEAD_DIM,
        "read_gb_s": bandwidth / 1e9,
        "rows": rows,
        "density": density_sweep(device, max(sizes) * 2, repeats),
    }


def density_sweep(device: str, size: int, repeats: int) -> list[dict]:
    """Time against the share of visible tiles, from windows of growing width: a line through the origin."""
    points = []
    problem = Problem("causal", 256, torch.float32, device)
    shape = (BATCH, HEADS, size, HEAD_DIM)
    problem.q, problem.k, problem.v = (torch.randn(shape, device=device) for _ in range(3))
    for share in (0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0):
        window = max(round(size * (1 - (1 - share) ** 0.5)), 1)  # of a symmetric band
        mask = BlockMask.from_window(size, window=window, causal=False, device=device)
        ms = 1e3 * measure.in_turn({"pyspec": problem.pyspec(mask)}, max(repeats // 4, 3), warmup=1)["pyspec"]
        points.append({"size": size, "density": mask.density, "ms": ms})
        print(f"N={size} {mask.density:6.1%} of tiles: {ms:.2f} ms, {ms / mask.density:.1f} ms a whole", flush=True)
    return points


def show(row: dict) -> None:
    ours = row["ms"]["pyspec"]
    print(
        f"{row['dtype']:>8} N={row['size']:<5} {row['pattern']:<9} {row['density']:6.1%} of tiles: {ours:.2f} ms, "
        f"{row['floor_ms'] / ours:.0%} of the floor; "
        + ", ".join(f"{name} {ms:.2f} ({ms / ours:.2f}x)" for name, ms in row["ms"].items() if name != "pyspec")
        + "; built in "
        + ", ".join(f"{name} {ms:.3f}" for name, ms in row["build_ms"].items()),
        flush=True,
    )
    target = TARGETS.get(row["pattern"])
    if target and row["size"] == 4096:
        wanted = target[row["dtype"] == "bfloat16"]
        print(f"         {row['ms'][target[2]] / ours:.2f}x {target[2]}, plan {wanted}x", flush=True)


def plot(result: dict, path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2))
    largest = max(row["size"] for row in result["rows"])
    for axis, dtype in zip(axes, ("bfloat16", "float32"), strict=False):
        rows = [row for row in result["rows"] if row["dtype"] == dtype and row["size"] == largest]
        names = ["base", "dense run", "sdpa", "sdpa full", *(["flex"] if "flex" in rows[0]["ms"] else [])]
        for i, name in enumerate(names):
            ratios = [row["ms"].get(name, 0.0) / row["ms"]["pyspec"] for row in rows]
            width = 0.8 / len(names)
            bars = axis.bar([x + i * width for x in range(len(rows))], ratios, width, label=name)
            axis.bar_label(bars, fmt="%.1f", fontsize=5)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_yscale("log")
        axis.set_xticks([x + 0.3 for x in range(len(rows))], [row["pattern"] for row in rows], rotation=40, fontsize=8)
        axis.set_title(f"{dtype}, N = {largest}", fontsize=9)
    axes[0].set_ylabel("time over time of block_masked_attention")
    axes[0].legend(fontsize=7)
    points = result["density"]
    axes[2].plot([p["density"] for p in points], [p["ms"] for p in points], "o-")
    axes[2].plot([0, 1], [0, points[-1]["ms"]], "--", color="0.6")
    axes[2].set_title(f"time against visible tiles, float32, N = {points[0]['size']}", fontsize=9)
    axes[2].set_xlabel("share of tiles")
    axes[2].set_ylabel("ms")
    machine = result["machine"]
    where = machine.get("gpu", machine["cpu"]) if result["device"] == "cuda" else machine["cpu"]
    figure.suptitle(
        f"batch {BATCH}, {HEADS} heads of {HEAD_DIM}; {where}, {machine['threads']} threads, torch {machine['torch']}, "
        f"{machine['date']}",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="N, up to 16,384 where memory allows")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--no-flex", action="store_true", help="leave out FlexAttention, which takes long to compile")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = run(options.device, options.sizes, not options.no_flex, options.repeats)
    path = measure.save(f"block_masked_attention_{options.device}", result)
    plot(result, path.with_suffix(".png"))
    print(f"wrote {path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
