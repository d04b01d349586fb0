"""What does a round of T draft nodes cost on a model with a recurrent state, against a plain step?

    python bench/hybrids.py            a table, bench/results/hybrids_cpu.json

A round is verify and commit through the whole model, with random weights in the shape of a known one, behind 512
tokens. All T nodes of a chain are accepted, which is the most that a method can have to do. In turn, in one process:

    replay      ours: the inputs are recorded, the next verify replays the accepted ones
    snapshots   a state for every node: our verify without a replay, and T writes of a state's size, its commit being
                free: at least what such a kernel costs
    recompute   the states are copied before the verify and restored, and the accepted tokens are verified again
    plain       one token, committed: what all are measured against

The floor of a plain step is what it must move (weights once, each sequence's state read and written) over the read
bandwidth that was measured in the run. The peer is one step of transformers on the same shape and dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from command_line import DTYPES, parse, parser_of, positive
from inside import weight_bytes

from pyspec import measure
from pyspec.architectures import family_of
from pyspec.entries import Entries
from pyspec.runners.foreign_support import cache_argument
from pyspec.runners.recurrent import RecurrentRunner
from pyspec.tree import DraftTree

SIZES, BATCHES, WAYS, PROMPT = (1, 2, 4, 6, 8, 12, 16), (1, 4, 16), ("replay", "snapshots", "recompute"), 512
SHAPES = {
    "Qwen3.5 0.8B": {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "vocab_size": 248320,
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 24,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "linear_num_value_heads": 16,
        "tie_word_embeddings": True,
    },
    "Mamba-2 130M": {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "vocab_size": 50288,
        "hidden_size": 768,
        "num_hidden_layers": 24,
        "num_heads": 24,
        "n_groups": 1,
        "tie_word_embeddings": True,
    },
}
GOALS = {("Qwen3.5 0.8B", 1, 6): {"avx512": 1.25, "avx2": 1.6}}
FLOOR_GOAL, PEER_GOAL, SNAPSHOT_GOAL = 1.3, 3.0, 1.5


def config_of(shape: dict):
    """The configuration that a config.json describes."""
    (architecture,) = shape["architectures"]
    family = family_of(architecture)
    return family.read("config.json", Entries("config.json", shape, family.architectures[architecture]), architecture)


def random_model(shape: dict, dtype: torch.dtype, device: str) -> RecurrentRunner:
    """A runner with random weights of a config.json's shape."""
    config, family = config_of(shape), family_of(*shape["architectures"])
    weights = family.weights.empty(config, torch.bfloat16 if dtype == torch.int8 else dtype, torch.device(device))
    for tensor in weights.named(config).values():
        tensor.normal_(1.0 if tensor.dim() == 1 else 0.0, 0.02)
    weights.lay_out(dtype)
    return family.runner(config, weights)


class Rounds:
    """The calls that are timed, on one model and batch."""

    def __init__(self, model: RecurrentRunner, batch: int):
        self.model, self.batch = model, batch
        model.prefill([list(range(PROMPT))] * batch, capacity=4096)
        state = getattr(model.cache, "state", model.cache)
        self._state = [state.states, state.windows]
        self._spare = [torch.empty_like(values) for values in self._state]

    def _trees(self, nodes: int) -> dict[int, DraftTree]:
        return dict.fromkeys(range(self.batch), DraftTree.chain([0] * nodes))

    def replay(self, nodes: int) -> Callable[[], None]:
        trees, paths = self._trees(nodes), dict.fromkeys(range(self.batch), range(nodes))

        def call() -> None:
            if max(self.model.lengths()) + 2 * nodes > 4096:
                self.model.prefill([list(range(PROMPT))] * self.batch, capacity=4096)
            self.model.verify(trees)
            self.model.commit(paths)

        return call

    def snapshots(self, nodes: int) -> Callable[[], None]:
        def call() -> None:
            self.model.verify(self._trees(nodes))
            self.model.commit({})
            for _ in range(nodes):
                self._spare[0].zero_()

        return call

    def recompute(self, nodes: int) -> Callable[[], None]:
        @torch.inference_mode()
        def call() -> None:
            for spare, values in zip(self._spare, self._state, strict=True):
                spare.copy_(values)
            self.model.verify(self._trees(nodes))
            self.model.commit({})
            for spare, values in zip(self._spare, self._state, strict=True):
                values.copy_(spare)
            self.model.verify(self._trees(nodes))
            self.model.commit({})

        return call

    def bytes(self) -> dict[str, int]:
        """What a plain step must move, and what is kept of a node."""
        config, states = self.model.config, sum(values.nbytes for values in self._state)
        shape = getattr(config, "recurrence", config)
        node = 4 * self.batch * shape.layers * (shape.record_width + shape.conv_channels)
        return {"weights": weight_bytes(self.model), "state": 2 * states, "node": node}


def peer(shape: dict, dtype: torch.dtype, batch: int) -> Callable[[], None]:
    """One step of transformers behind the same prompt."""
    import transformers

    options = {name: value for name, value in shape.items() if name not in ("architectures", "model_type")}
    config = transformers.CONFIG_MAPPING[shape["model_type"]](**options)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    token, name = torch.zeros(batch, 1, dtype=torch.int64), cache_argument(type(model))
    with torch.inference_mode():
        cache = {name: model(torch.arange(PROMPT).expand(batch, -1), use_cache=True)[name]}

    @torch.inference_mode()
    def call() -> None:
        model(token, use_cache=True, **cache)

    return call


def run(name: str, dtype: str, batch: int, repeats: int, device: str = "cpu", sizes=SIZES, shapes=SHAPES) -> dict:
    """Medians of all rounds, in turn, with random weights."""
    rounds = Rounds(random_model(shapes[name], DTYPES[dtype], device), batch)
    moved, bandwidth = rounds.bytes(), measure.read_bandwidth(device)
    calls = {(way, nodes): getattr(rounds, way)(nodes) for way in WAYS for nodes in sizes}
    if device == "cpu" and dtype != "int8":
        calls["transformers", 1] = peer(shapes[name], DTYPES[dtype], batch)
    seconds = measure.in_turn(calls, repeats)
    bandwidth = max(bandwidth, measure.read_bandwidth(device))  # it drifts: the better of before and after
    plain, floor = seconds["replay", 1], (moved["weights"] + moved["state"]) / bandwidth
    return {
        "model": name,
        "weights": dtype,
        "batch": batch,
        "bytes": moved,
        "bytes_per_second": bandwidth,
        "plain_over_floor": plain / floor,
        "seconds": {f"{way} {nodes}": time for (way, nodes), time in seconds.items()},
        "over_plain": {f"{way} {nodes}": time / plain for (way, nodes), time in seconds.items()},
    }


def show(console, found: dict, sizes=SIZES) -> None:
    over, batch, moved = found["over_plain"], found["batch"], found["bytes"]
    title = f"{found['model']}, {found['weights']}, batch {batch}: a round over a plain step"
    table = measure.new_table("nodes", "goal", *WAYS, left=0, title=title)
    for nodes in sizes:
        goals = GOALS.get((found["model"], batch, nodes), {})
        goal = ", ".join(f"{most}x ({name})" for name, most in goals.items())
        table.add_row(str(nodes), goal, *(f"{over[f'{way} {nodes}']:.2f}x" for way in WAYS))
    console.print(table)
    share = 100 * moved["node"] / (moved["state"] / 2)
    console.print(
        f"plain step {found['seconds']['replay 1'] * 1e3:.1f} ms, {found['plain_over_floor']:.2f}x its floor in bytes "
        f"(goal: at most {FLOOR_GOAL}x); states {moved['state'] / 2e6:.1f} MB; what is recorded of a node, with the "
        f"convolution's, {moved['node'] / 1e6:.2f} MB, {share:.1f}% of them"
    )
    if "transformers 1" in over:
        console.print(f"transformers' step: {over['transformers 1']:.1f}x ours (goal: at least {PEER_GOAL:.0f}x)")
    if batch == 16 and "snapshots 6" in over:
        ratio = over["snapshots 6"] / over["replay 6"]
        console.print(f"snapshots of 6 nodes take {ratio:.2f}x the time of a replay (goal: at least {SNAPSHOT_GOAL}x)")


def main() -> None:
    parser = parser_of(__doc__, repeats=7, devices=True)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--batches", nargs="+", type=positive, default=list(BATCHES))
    options = parse(parser)
    from rich.console import Console

    console, results = Console(highlight=False), []
    for name, dtype, batch in product(options.models, options.dtypes, options.batches):
        results.append(run(name, dtype, batch, options.repeats, options.device))
        show(console, results[-1])
    result = {"machine": measure.machine(), "device": options.device, "results": results}
    print(f"wrote {measure.save(f'hybrids_{options.device}', result)}")


if __name__ == "__main__":
    main()
