"""How fast is attention over quantised keys and values, and what do they cost to quantise and to keep?

    python bench/bench_gear.py              a table, bench/results/gear_cpu.{json,png}
    pytest bench --benchmark-only           the kernels alone, to compare before and after a change

Attention of T nodes behind n tokens, quantised blocks and the tail in full precision together, against our own
tree_attention over a dense bf16 cache and torch's scaled_dot_product_attention in bf16. The floor is the larger of the
bytes of the records over the measured read bandwidth and the operations over the measured rate of a large matrix
product. A time does not depend on the values, so one piece of text is quantised and then repeated.
"""

from __future__ import annotations

import pytest
import torch
from command_line import parse, parser_of, positive
from torch.nn.functional import scaled_dot_product_attention

from pyspec import DraftTree, measure
from pyspec.caches import CACHES, GearSettings, cache_from_name
from pyspec.ops import gear_decode, gear_encode, tree_attention
from pyspec.ops.gear import BLOCK, TreeRows, attend_tree, blocks_seen

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
NODES, LENGTHS = (1, 8, 32), (1024, 4096, 16384, 32768, 65536)
FORMATS = {
    **{name: cache for name in CACHES if isinstance(cache := cache_from_name(name), GearSettings)},
    "4 bits, groups of 64": GearSettings(4, 64),
    "4 bits, low rank": GearSettings(4, 128, rank=4),
    "2 bits, outliers": GearSettings(2, 64, outliers=2),
}
PIECE = 8 * BLOCK  # tokens that are really quantised
TARGETS = {("int4", 1, 32768): 1.8, ("kivi-2bit", 1, 32768): 2.2, ("int4", 8, 32768): 1.0}


class Problem:
    """One verification behind `length` tokens, batch 1, bf16."""

    def __init__(self, nodes: int, length: int):
        generator = torch.Generator().manual_seed(nodes + length)
        self.nodes, self.length = nodes, length
        self.q = torch.randn(1, HEADS, nodes, HEAD_DIM, generator=generator).bfloat16()
        piece = torch.randn(2, 1, KV_HEADS, PIECE, HEAD_DIM, generator=generator).bfloat16()
        repeats = -(-(length + nodes) // PIECE)
        self.piece = piece.unbind(0)
        self.k, self.v = (x.repeat(1, 1, repeats, 1)[:, :, : length + nodes] for x in self.piece)
        parents = [-1] + [int(torch.randint(0, node, (1,), generator=generator)) for node in range(1, nodes)]
        self.bits = torch.from_numpy(DraftTree([0] * nodes, parents).ancestor_bits)[None]
        self.lens = torch.tensor([length], dtype=torch.int32)
        index = torch.arange(nodes)
        ancestors = (self.bits[0][:, index // 32] >> (index % 32)) & 1 == 1
        self.mask = torch.cat([torch.ones(nodes, length, dtype=torch.bool), ancestors], 1)

    def dense(self) -> torch.Tensor:
        return tree_attention(self.q, self.k, self.v, self.bits, self.lens)

    def sdpa(self) -> torch.Tensor:
        return scaled_dot_product_attention(self.q, self.k, self.v, self.mask, enable_gqa=True)

    def quantised(self, format: GearSettings):
        """The attention as a runner calls it: quantised blocks, the tail in a buffer of its own, rows worked out."""
        record = gear_encode(*self.piece, format)
        quantised = record.repeat(1, 1, -(-self.length // PIECE), 1)
        start = blocks_seen(self.length, format.window) * BLOCK
        k, v = (x[:, :, start:].contiguous() for x in (self.k, self.v))
        rows = TreeRows.of(self.bits, self.lens, format.window)
        return lambda: attend_tree(self.q, quantised, k, v, rows, format, HEAD_DIM**-0.5)[0]

    def check(self, format: GearSettings) -> None:
        """Refuses to time a wrong result."""
        k, v = self.k.double(), self.v.double()
        start = blocks_seen(self.length, format.window) * BLOCK
        decoded = gear_decode(gear_encode(*self.piece, format), format, HEAD_DIM)
        for exact, x in zip((k, v), decoded, strict=True):
            exact[:, :, :start] = x.double().repeat(1, 1, -(-self.length // PIECE), 1)[:, :, :start]
        expected = scaled_dot_product_attention(self.q.double(), k, v, self.mask, enable_gqa=True)
        torch.testing.assert_close(self.quantised(format)().double(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("nodes", [1, 8])
@pytest.mark.parametrize("name", ["int4", "kivi-2bit", "gear-2bit"])
def bench_gear(benchmark, name, nodes):
    problem = Problem(nodes, 4096)
    problem.check(FORMATS[name])
    benchmark(problem.quantised(FORMATS[name]))


def run(names: list[str], lengths: list[int], repeats: int) -> dict:
    bandwidth, rate = measure.read_bandwidth(), measure.multiply_rate(torch.bfloat16)
    problem = Problem(8, 1024)
    for name in names:
        problem.check(FORMATS[name])
    rows = []
    for nodes in NODES:
        for length in lengths:
            problem = Problem(nodes, length)
            calls = {"dense": problem.dense, "sdpa": problem.sdpa}
            calls |= {name: problem.quantised(FORMATS[name]) for name in names}
            ms = {name: 1e3 * seconds for name, seconds in measure.in_turn(calls, repeats).items()}
            operations = 1e3 * 4 * HEADS * nodes * length * HEAD_DIM / rate
            floors = {"dense": max(operations, 1e3 * 4 * KV_HEADS * length * HEAD_DIM / bandwidth)}
            for name in names:
                bytes_read = KV_HEADS * length // BLOCK * FORMATS[name].record_bytes(HEAD_DIM)
                floors[name] = max(operations, 1e3 * bytes_read / bandwidth)
            rows.append({"nodes": nodes, "length": length, "ms": ms, "floor_ms": floors})
            show(rows[-1])
    return {
        "machine": measure.machine(),
        "heads": HEADS,
        "kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "read_gb_s": bandwidth / 1e9,
        "rows": rows,
        "encode": encode_times(names, repeats),
    }


def show(row: dict) -> None:
    ms, floors = row["ms"], row["floor_ms"]
    print(f"T={row['nodes']:<2} n={row['length']:<6} dense {ms['dense']:.2f} ms  sdpa {ms['sdpa']:.2f} ms")
    for name in floors:
        target = TARGETS.get((name, row["nodes"], row["length"]))
        print(
            f"    {name:<22} {ms[name]:8.2f} ms  {ms['dense'] / ms[name]:5.2f}x dense  {ms['sdpa'] / ms[name]:5.2f}x "
            f"sdpa  floor {floors[name]:.2f} ms ({floors[name] / ms[name]:.0%})"
            + (f"  target {target}x" if target else ""),
            flush=True,
        )


def encode_times(names: list[str], repeats: int) -> dict[str, dict[str, float]]:
    """Microseconds to quantise a token's keys and values, of one layer, and the bits of each number kept."""
    k, v = torch.randn(2, 1, KV_HEADS, BLOCK, HEAD_DIM).bfloat16().unbind(0)
    seconds = measure.in_turn({name: lambda f=FORMATS[name]: gear_encode(k, v, f) for name in names}, repeats)
    found = {}
    for name in names:
        bits = FORMATS[name].effective_bits(HEAD_DIM, 8192)
        found[name] = {"us_per_token_and_layer": 1e6 * seconds[name] / BLOCK, "effective_bits_at_8k": bits}
        us = found[name]["us_per_token_and_layer"]
        print(f"{name:<22} a token of a layer is quantised in {us:.1f} us, {bits:.2f} bits")
    return found


def plot(result: dict, path) -> None:
    plt = measure.pyplot()
    figure, axes = plt.subplots(1, len(NODES), figsize=(4 * len(NODES), 4), sharey=True)
    for axis, nodes in zip(axes, NODES, strict=True):
        rows = [row for row in result["rows"] if row["nodes"] == nodes]
        for name in rows[0]["ms"]:
            if name != "dense":
                lengths = [row["length"] for row in rows]
                axis.plot(lengths, [row["ms"]["dense"] / row["ms"][name] for row in rows], "o-", label=name)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("tokens")
        axis.set_title(f"{nodes} nodes")
    axes[0].set_ylabel("time of dense tree_attention over time")
    axes[-1].legend(fontsize=7)
    what = f"attention over quantised caches, {HEADS} query and {KV_HEADS} KV heads of {HEAD_DIM}"
    measure.save_figure(figure, what, result, path)


def main() -> None:
    parser = parser_of(__doc__, repeats=15)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--lengths", nargs="+", type=positive, default=list(LENGTHS))
    options = parse(parser)
    result = run(options.formats, options.lengths, options.repeats)
    path = measure.save("gear_cpu", result)
    plot(result, path.with_suffix(".png"))
    print(f"wrote {path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
