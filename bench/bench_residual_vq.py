"""What does attention over codes cost, against our own dense attention and torch's SDPA?

    python bench/bench_residual_vq.py                a table, and bench/results/residual_vq_cpu.json
    pytest bench/bench_residual_vq.py                a few sizes under pytest-benchmark

"depth x codes" is how a group of 32 channels is kept, of keys as they are cached or before rotary embedding. The floor
is the larger of the records that must be read and the operations that must be done: an add of a table entry for each
code and query row, twice (scores and masses), and the multiply-adds of tables and masses with the codebooks. Keys
before rotary embedding have no tables but are rebuilt, an add for each of their numbers and levels, and multiplied.
Codebooks are random: times do not hang on what they hold.
"""

import pytest
import torch
from bench_gear import HEAD_DIM, HEADS, KV_HEADS, LENGTHS, NODES, PIECE, Problem
from command_line import parse, parser_of, positive
from torch.nn.functional import scaled_dot_product_attention

from pyspec import measure
from pyspec.ops import residual_vq_decode, residual_vq_encode, rotary_of_blocks
from pyspec.ops.gear import BLOCK, TreeRows, blocks_seen, join_exact
from pyspec.ops.residual_vq import WIDTH, attend_codes, format_of, turn_keys

WINDOW = 64
CHUNK = 32 * BLOCK  # tokens whose masses meet the codebooks together (kernels/params/residual_vq.h)
PRE_ROPE = "8 x 256, pre-rope"
SHAPES = {"8 x 256": (8, 256), "4 x 256": (4, 256), "8 x 2048": (8, 2048), PRE_ROPE: (8, 256)}
FREQUENCIES = 10000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
TARGETS = {("8 x 256", 1, 32768): 1.0}


def codebooks(name: str) -> torch.Tensor:
    depth, codes = SHAPES[name]
    words = torch.randn(2, depth, codes, WIDTH, generator=torch.Generator().manual_seed(depth))
    return (words * 0.8 * 0.8 ** torch.arange(depth)[:, None, None]).half()


def attention(problem: Problem, books: torch.Tensor, pre_rope: bool = False):
    """As a runner calls it: quantised blocks, the tail in a buffer of its own, rows worked out."""
    quantised = residual_vq_encode(*problem.piece, books).repeat(1, 1, -(-problem.length // PIECE), 1)
    start = blocks_seen(problem.length, WINDOW) * BLOCK
    k, v = (x[:, :, start:].contiguous() for x in (problem.k, problem.v))
    rows, scale = TreeRows.of(problem.bits, problem.lens, WINDOW), HEAD_DIM**-0.5
    rotary = rotary_of_blocks(FREQUENCIES, quantised.shape[2]) if pre_rope else None

    def call() -> torch.Tensor:
        quantised_part = attend_codes(problem.q, quantised, rows, books, scale, rotary)
        return join_exact(quantised_part, problem.q, k, v, rows, scale)[0]

    return call


def check(problem: Problem, books: torch.Tensor, pre_rope: bool = False) -> None:
    """Refuses to time a wrong result."""
    k, v = problem.k.double(), problem.v.double()
    start = blocks_seen(problem.length, WINDOW) * BLOCK
    decoded = residual_vq_decode(residual_vq_encode(*problem.piece, books), books, HEAD_DIM)
    whole = [x.repeat(1, 1, -(-problem.length // PIECE), 1) for x in decoded]
    if pre_rope:
        whole[0] = turn_keys(whole[0], rotary_of_blocks(FREQUENCIES, whole[0].shape[2] // BLOCK))
    for exact, x in zip((k, v), whole, strict=True):
        exact[:, :, :start] = x[:, :, :start].double()
    expected = scaled_dot_product_attention(problem.q.double(), k, v, problem.mask, enable_gqa=True)
    torch.testing.assert_close(attention(problem, books, pre_rope)().double(), expected, atol=2e-2, rtol=2e-2)


def floor_ms(
    nodes: int, length: int, books: torch.Tensor, bandwidth: float, rate: float, pre_rope: bool = False
) -> float:
    format = format_of(books)
    read = KV_HEADS * length // BLOCK * format.record_bytes(HEAD_DIM)
    adds = 2 * HEADS * nodes * length * HEAD_DIM // WIDTH * format.depth
    products = 2 * HEADS * nodes * HEAD_DIM * format.depth * format.codes * (1 + -(-length // CHUNK))
    if pre_rope:
        adds = adds // 2 + KV_HEADS * length * HEAD_DIM * format.depth
        products -= 2 * HEADS * nodes * HEAD_DIM * (format.depth * format.codes - length)
    return 1e3 * max(read / bandwidth, (adds + products) / rate)


@pytest.mark.parametrize("nodes", [1, 8])
def bench_residual_vq(benchmark, nodes):
    problem, books = Problem(nodes, 4096), codebooks("8 x 256")
    check(problem, books)
    benchmark(attention(problem, books))


def run(names: list[str], lengths: list[int], repeats: int) -> dict:
    bandwidth, rate = measure.read_bandwidth(), measure.multiply_rate(torch.float32)
    books = {name: codebooks(name) for name in names}
    for name in names:
        check(Problem(8, 1024), books[name], name == PRE_ROPE)
    rows = []
    for nodes in NODES:
        for length in lengths:
            problem = Problem(nodes, length)
            calls = {"dense": problem.dense, "sdpa": problem.sdpa}
            calls |= {name: attention(problem, books[name], name == PRE_ROPE) for name in names}
            ms = {name: 1e3 * seconds for name, seconds in measure.in_turn(calls, repeats).items()}
            floors = {name: floor_ms(nodes, length, books[name], bandwidth, rate, name == PRE_ROPE) for name in names}
            rows.append({"nodes": nodes, "length": length, "ms": ms, "floor_ms": floors})
            show(rows[-1])
    return {
        "machine": measure.machine(),
        "heads": HEADS,
        "kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "read_gb_s": bandwidth / 1e9,
        "fp32_gflop_s": rate / 1e9,
        "rows": rows,
        "encode": encode_times({name: b for name, b in books.items() if name != PRE_ROPE}, rate, repeats),
    }


def show(row: dict) -> None:
    ms, floors = row["ms"], row["floor_ms"]
    print(f"T={row['nodes']:<2} n={row['length']:<6} dense {ms['dense']:.2f} ms  sdpa {ms['sdpa']:.2f} ms")
    for name, floor in floors.items():
        target = TARGETS.get((name, row["nodes"], row["length"]))
        print(
            f"    {name:<17} {ms[name]:8.2f} ms  {ms['dense'] / ms[name]:5.2f}x dense  {ms['sdpa'] / ms[name]:5.2f}x "
            f"sdpa  floor {floor:.2f} ms ({floor / ms[name]:.0%})" + (f"  target {target}x" if target else ""),
            flush=True,
        )


def encode_times(books: dict[str, torch.Tensor], rate: float, repeats: int) -> dict[str, dict[str, float]]:
    """Microseconds to quantise a token's keys and values, of one layer; their floor, and the bits of each number."""
    k, v = torch.randn(2, 1, KV_HEADS, BLOCK, HEAD_DIM).bfloat16().unbind(0)
    seconds = measure.in_turn({name: lambda b=b: residual_vq_encode(k, v, b) for name, b in books.items()}, repeats)
    found = {}
    for name, b in books.items():
        format = format_of(b)
        us = 1e6 * seconds[name] / BLOCK
        floor = 1e6 * 2 * 2 * KV_HEADS * HEAD_DIM * format.depth * format.codes / rate
        bits = 8 * format.record_bytes(HEAD_DIM) / (2 * HEAD_DIM * BLOCK)
        found[name] = {"us_per_token_and_layer": us, "floor_us": floor, "bits": bits}
        print(
            f"{name:<10} a token of a layer is quantised in {us:.1f} us, floor {floor:.1f} us; {bits:.3f} bits a number"
        )
    return found


def main() -> None:
    parser = parser_of(__doc__, repeats=15)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--lengths", nargs="+", type=positive, default=list(LENGTHS))
    options = parse(parser)
    print(f"wrote {measure.save('residual_vq_cpu', run(options.shapes, options.lengths, options.repeats))}")


if __name__ == "__main__":
    main()
