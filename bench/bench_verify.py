"""What does a verify of T nodes cost, against one plain step and against the floor?

    python bench/bench_verify.py            a table, bench/results/verify_<device>.json

A whole verify of LlamaRunner, tree to logits, behind 1000 committed tokens, with random weights in the shape of a known
model: a time does not depend on the values. On a GPU the same verify launch by launch stands beside the replayed graph.
The floor is the bytes of the weights and of the prefix's keys and values over the measured read bandwidth.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import measure
import torch

from pyspec import DraftTree
from pyspec.models.llama import LlamaConfig, LlamaRunner, LlamaWeights

PREFIX = 1000
NODES = (1, 2, 4, 8, 16, 32, 64)
SHAPES = {  # hidden, intermediate, layers, heads, KV heads, head_dim, vocabulary, tied embedding
    "SmolLM2-135M": (576, 1536, 30, 9, 3, 64, 49152, True),
    "Llama-3.2-1B": (2048, 8192, 16, 32, 8, 64, 128256, True),
    "Llama-3.1-8B": (4096, 14336, 32, 32, 8, 128, 128256, False),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.int8}


def random_model(shape: str, dtype: torch.dtype, device: str) -> LlamaRunner:
    hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary, tied = SHAPES[shape]
    config = LlamaConfig(
        architecture="llama",
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        context_length=8192,
        norm_epsilon=1e-5,
        rope_base=500000.0,
        tied_embedding=tied,
    )
    dense = torch.bfloat16 if dtype == torch.int8 else dtype
    weights = LlamaWeights.empty(config, dense, torch.device(device))
    for tensor in weights.named(config).values():
        tensor.normal_(1.0 if tensor.dim() == 1 else 0.0, 0.02)
    weights.pack(dtype)
    return LlamaRunner(config, weights)


def packed_bytes(runner: LlamaRunner) -> int:
    layers = (
        matrix for layer in runner.weights.layers for matrix in (layer.qkv, layer.output, layer.gate_up, layer.down)
    )
    return sum(matrix.nbytes for matrix in (*layers, runner.weights.head))


def launched(runner: LlamaRunner, tree: DraftTree) -> Callable[[], None]:
    """The verify of a GPU without its graph."""

    @torch.inference_mode()
    def call() -> None:
        runner._logits(runner._steps.alone(runner._step, tree, 0))

    return call


def run(shape: str, dtype: str, device: str, repeats: int) -> list[dict]:
    runner = random_model(shape, DTYPES[dtype], device)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, runner.vocab_size, (PREFIX,), generator=generator).tolist()
    runner.prefill([prompt], capacity=PREFIX + NODES[-1])
    trees = {}
    for nodes in NODES:
        parents = [-1] + [int(torch.randint(0, node, (1,), generator=generator)) for node in range(1, nodes)]
        trees[nodes] = DraftTree(prompt[:nodes], parents)
    calls = {f"{nodes}": lambda tree=tree: runner.verify([tree]) for nodes, tree in trees.items()}
    if device == "cuda":
        calls |= {f"{nodes}, launches": launched(runner, tree) for nodes, tree in trees.items()}
    ms = {name: 1e3 * seconds for name, seconds in measure.in_turn(calls, repeats).items()}
    moved = packed_bytes(runner) + runner._cache.keys_values[..., :PREFIX, :].nbytes
    floor = 1e3 * moved / measure.read_bandwidth(device)
    rows = []
    for nodes in NODES:
        rows.append(
            {
                "model": shape,
                "weights": dtype,
                "nodes": nodes,
                "ms": ms[f"{nodes}"],
                "launches_ms": ms.get(f"{nodes}, launches"),
                "over_one": ms[f"{nodes}"] / ms["1"],
                "floor_ms": floor,
            }
        )
        launches = "" if device == "cpu" else f"launch by launch {rows[-1]['launches_ms']:8.2f} ms  "
        print(
            f"{shape:>13} {dtype} T={nodes:<3} {rows[-1]['ms']:8.2f} ms, {rows[-1]['over_one']:5.2f} of one node  "
            f"{launches}floor {floor:.2f} ms ({floor / rows[-1]['ms']:.0%})",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["SmolLM2-135M"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "int8"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [
        row
        for model in options.models
        for dtype in options.dtypes
        for row in run(model, dtype, options.device, options.repeats)
    ]
    result = {"machine": measure.machine(), "device": options.device, "prefix": PREFIX, "rows": rows}
    print(f"wrote {measure.save(f'verify_{options.device}', result)}")


if __name__ == "__main__":
    main()
