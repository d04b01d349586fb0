"""What does a verify of T nodes cost, against one plain step and against the floor?

    python bench/bench_verify.py            a table, bench/results/verify_<device>.json

A whole verify of AttentionRunner, tree to logits, with random weights in the shape of a known model: a time does not
depend on the values. The same verify launch by launch stands beside what is replayed. See steps.py.
"""

from __future__ import annotations

from itertools import product

import steps
import torch
from command_line import DTYPES, parse, parser_of
from inside import launched

from pyspec import measure
from pyspec.architectures.llama import LlamaConfig, LlamaWeights
from pyspec.runners.attention import AttentionRunner

SHAPES = {  # hidden, intermediate, layers, heads, KV heads, head_dim, vocabulary, tied embedding
    "SmolLM2-135M": (576, 1536, 30, 9, 3, 64, 49152, True),
    "Llama-3.2-1B": (2048, 8192, 16, 32, 8, 64, 128256, True),
    "Llama-3.1-8B": (4096, 14336, 32, 32, 8, 128, 128256, False),
}


def random_model(shape: str, dtype: torch.dtype | str, device: str) -> AttentionRunner:
    """Of a dtype that weights are laid out in; activations are bf16 where that is no dtype of theirs."""
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
    dense = torch.bfloat16 if dtype in (torch.int8, "int4") else dtype
    weights = LlamaWeights.empty(config, dense, torch.device(device))
    for tensor in weights.named(config).values():
        tensor.normal_(1.0 if tensor.dim() == 1 else 0.0, 0.02)
    weights.lay_out(dtype)
    return AttentionRunner(config, weights, dtype=dense)


def times(runner: AttentionRunner, shape: str, dtype: str, repeats: int) -> dict:
    launches = {str(nodes): launched(runner, steps.tree_of(nodes)) for nodes in (1, steps.SIZES[-1])}
    found = steps.steps(runner, repeats)
    return {"model": shape, "weights": dtype, **found, "launched_seconds": measure.in_turn(launches, repeats)}


def show(found: dict, has_goals: bool = False) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print(f"{found['model']}, {found['weights']}")
    steps.show(console, found, has_goals)
    for nodes, seconds in found["launched_seconds"].items():
        console.print(f"launch by launch, {nodes} nodes: {seconds * 1e3:.2f} ms")


def main() -> None:
    parser = parser_of(__doc__, repeats=15, devices=True)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["SmolLM2-135M"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "int8"])
    options = parse(parser)
    result = {"machine": measure.machine(), "device": options.device, "results": []}
    for model, dtype in product(options.models, options.dtypes):
        runner = random_model(model, DTYPES[dtype], options.device)
        result["results"].append(times(runner, model, dtype, options.repeats))
        show(result["results"][-1], (model, dtype, options.device) == ("SmolLM2-135M", "bf16", "cpu"))
        path = measure.save(f"verify_{options.device}", result)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
