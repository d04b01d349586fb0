"""What does a round of T draft tokens cost on a state space model, against a plain step and the floor?

    python bench/bench_selective_state.py            a table, bench/results/selective_state_<device>.json
    python bench/bench_selective_state.py --models --trained models/demo-ssm         rounds and texts of a trained model

A round is verify and commit through the whole model, with random weights in the shape of a known one: a time does not
depend on the values. All T nodes are accepted, which is the most that a method can have to do. The ways to have the
right state afterwards are timed in turn:

    replay      ours: the inputs are recorded, the next verify replays the accepted ones
    snapshots   a state is written for every node; timed as our verify, without a replay, and T writes of a state's
                size: at least what such a kernel costs, its commit being free
    joint       the paper's other method, Joint Attainment and Advancement (joint.py): the accepted tokens run through
                the whole model again, below the next tree and beside it
    recompute   the state is copied before the verify, restored when a draft was wrong, and the accepted tokens run
                through the whole model again
    plain       one token, committed: what all are measured against

The floor of a plain step is what it must move (weights once, each sequence's state read and written) over the measured
read bandwidth. Beside each ratio stands its floor: the bytes that the way must move over those of the plain step. The
peer is one step of transformers on the same shape and dtype.

With a trained model, 20 beginnings of modules of the standard library that it has not seen are continued too, greedily:
tokens a second of plain decoding, of drafts out of the text so far, and of transformers' generate.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import product

import torch
from command_line import DTYPES, parse, parser_of, positive
from inside import read, weight_bytes
from joint import JointRounds

import pyspec
from pyspec import measure
from pyspec.architectures.mamba import MambaConfig
from pyspec.architectures.mamba2 import Mamba2Config
from pyspec.architectures.state_space import StateSpaceWeights
from pyspec.runners.foreign_support import cache_argument
from pyspec.runners.recurrent import RecurrentRunner
from pyspec.tree import DraftTree

SIZES = (1, 2, 4, 6, 8, 12, 16)  # draft nodes
BATCHES = (1, 4, 16)
WAYS = ("replay", "snapshots", "joint", "recompute")
PROMPTS, PROMPT_CHARACTERS = 20, 400
GOALS = {("Mamba-2 130M", 1, 6): 1.20, ("Mamba-2 370M", 1, 6): 1.15}  # at most; replay in bf16 on the CPU
FLOOR_GOAL, PEER_GOAL, SNAPSHOT_GOAL, TEXT_GOAL = 1.3, 4.0, 1.5, 1.5


def mamba2(hidden: int, layers: int) -> Mamba2Config:
    return Mamba2Config(
        vocab_size=50288,
        hidden_size=hidden,
        layers=layers,
        heads=hidden // 32,
        head_dim=64,
        groups=1,
        state_size=128,
        conv_taps=4,
        norm_epsilon=1e-5,
        tied_embedding=True,
    )


def mamba(hidden: int, layers: int) -> MambaConfig:
    return MambaConfig(
        vocab_size=50280,
        hidden_size=hidden,
        layers=layers,
        channels=2 * hidden,
        state_size=16,
        dt_rank=hidden // 16,
        conv_taps=4,
        norm_epsilon=1e-5,
    )


SHAPES = {
    "Mamba-2 130M": mamba2(768, 24),
    "Mamba-2 370M": mamba2(1024, 48),
    "Mamba-2 1.3B": mamba2(2048, 48),
    "Mamba-2 2.7B": mamba2(2560, 64),
    "Mamba 130M": mamba(768, 24),
    "Mamba 370M": mamba(1024, 48),
}


def random_model(config: MambaConfig | Mamba2Config, dtype: torch.dtype, device: str) -> RecurrentRunner:
    dense = torch.bfloat16 if dtype == torch.int8 else dtype
    weights = StateSpaceWeights.empty(config, dense, torch.device(device))
    for name, tensor in weights.named(config).items():
        tensor.normal_(1.0 if tensor.dim() == 1 else 0.0, 0.02)
        if name.endswith(("dt_bias", "dt_proj.bias")):
            tensor.fill_(-4.0)  # steps of some 0.02, as in trained models
    weights.lay_out(dtype)
    return (RecurrentRunner if isinstance(config, Mamba2Config) else RecurrentRunner)(config, weights)


class Rounds:
    """The calls that are timed, on one model and batch."""

    def __init__(self, model: RecurrentRunner, batch: int):
        self.model, self.batch = model, batch
        prompts = [[place % model.vocab_size for place in range(8)]] * batch
        model.warm(sequences=batch)  # or recompute would be launched on a GPU, where the others are replayed
        model.prefill(prompts)
        joint_model = model.fork()
        joint_model.warm(sequences=2 * batch)
        self._joint = JointRounds(joint_model, prompts)
        cache = model.cache
        self.spare = [torch.empty_like(cache.states), torch.empty_like(cache.windows)]

    def replay(self, nodes: int) -> Callable[[], None]:
        return self._rounds(self.model, nodes)

    def joint(self, nodes: int) -> Callable[[], None]:
        return self._rounds(self._joint, nodes)

    def _rounds(self, model: RecurrentRunner | JointRounds, nodes: int) -> Callable[[], None]:
        tree = DraftTree.chain([0] * nodes)
        trees, paths = (dict.fromkeys(range(self.batch), value) for value in (tree, range(nodes)))

        def call() -> None:
            model.verify(trees)
            model.commit(paths)

        return call

    def snapshots(self, nodes: int) -> Callable[[], None]:
        trees = dict.fromkeys(range(self.batch), DraftTree.chain([0] * nodes))

        def call() -> None:
            self.model.verify(trees)
            self.model.commit({})
            for _ in range(nodes):
                self.spare[0].zero_()

        return call

    def recompute(self, nodes: int) -> Callable[[], None]:
        trees, sequences = [DraftTree.chain([0] * nodes)] * self.batch, list(range(self.batch))
        cache = self.model.cache

        @torch.inference_mode()
        def call() -> None:
            state = (cache.states, cache.windows)
            for kept, values in zip(self.spare, state, strict=True):
                kept.copy_(values)
            read(self.model, trees, sequences, [True] * self.batch)
            for kept, values in zip(self.spare, state, strict=True):
                values.copy_(kept)
            read(self.model, trees, sequences, [True] * self.batch, logits=False)

        return call

    def bytes(self) -> dict[str, int]:
        """What a plain step must move."""
        model, cache = self.model, self.model.cache
        return {
            "weights": weight_bytes(model),
            "state": 2 * (cache.states.nbytes + cache.windows.nbytes),
            "node": 4 * self.batch * model.config.layers * (model.config.record_width + model.config.conv_channels),
        }


def floor_bytes(way: str, nodes: int, moved: dict[str, int]) -> float:
    """What a round must move, by Rounds.bytes: weights, passes over the states, nodes written to a record and read."""
    weights, one_pass, node = moved["weights"], moved["state"] / 2, moved["node"]
    return {
        "replay": weights + 2 * one_pass + 2 * nodes * node,
        "snapshots": weights + (1 + nodes) * one_pass,
        "joint": weights + 5 * one_pass,
        "recompute": 2 * weights + 6 * one_pass,
    }[way]


def peer(config: MambaConfig | Mamba2Config, dtype: torch.dtype, batch: int) -> Callable[[], None]:
    """One step of transformers."""
    import transformers

    shape = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.layers,
        "state_size": config.state_size,
        "tie_word_embeddings": config.tied_embedding,
    }
    if isinstance(config, Mamba2Config):
        shape |= {"num_heads": config.heads, "head_dim": config.head_dim, "n_groups": config.groups}
        described = transformers.Mamba2Config(**shape)
    else:
        described = transformers.MambaConfig(**shape)
    return step_of(transformers.AutoModelForCausalLM.from_config(described, dtype=dtype).eval(), batch)


def step_of(model, batch: int) -> Callable[[], None]:
    token, name = torch.zeros(batch, 1, dtype=torch.int64), cache_argument(type(model))

    @torch.inference_mode()
    def call() -> None:
        model(token, use_cache=True, **cache)

    with torch.inference_mode():
        cache = {name: model(token, use_cache=True)[name]}
    return call


def run(shape: str, dtype: str, batch: int, repeats: int, device: str = "cpu", sizes=SIZES, shapes=SHAPES) -> dict:
    """Medians of all rounds, in turn, with random weights."""
    config = shapes[shape]
    step = peer(config, DTYPES[dtype], batch) if device == "cpu" and dtype != "int8" else None
    return time_rounds(shape, random_model(config, DTYPES[dtype], device), step, dtype, batch, repeats, sizes)


def time_rounds(
    name: str, model: RecurrentRunner, step: Callable | None, dtype: str, batch: int, repeats: int, sizes=SIZES
) -> dict:
    """Medians of all rounds of a model and of a peer's step, in turn."""
    rounds, device = Rounds(model, batch), model.device.type
    moved = rounds.bytes()
    bandwidth = measure.read_bandwidth(device)
    calls = {(way, nodes): getattr(rounds, way)(nodes) for way in WAYS for nodes in sizes}
    if step is not None:
        calls["transformers", 1] = step
    seconds = measure.in_turn(calls, repeats)
    bandwidth = max(bandwidth, measure.read_bandwidth(device))  # it drifts: the better of before and after
    plain_bytes = moved["weights"] + moved["state"]
    plain, floor = seconds["replay", 1], plain_bytes / bandwidth
    return {
        "model": name,
        "weights": dtype,
        "batch": batch,
        "bytes": moved,
        "bytes_per_second": bandwidth,
        "floor_seconds": floor,
        "plain_over_floor": plain / floor,
        "seconds": {f"{way} {nodes}": time for (way, nodes), time in seconds.items()},
        "over_plain": {f"{way} {nodes}": time / plain for (way, nodes), time in seconds.items()},
        "floor_over_plain": {
            f"{way} {nodes}": floor_bytes(way, nodes, moved) / plain_bytes for way in WAYS for nodes in sizes
        },
    }


def continue_texts(folder: str, dtype: str, new_tokens: int) -> dict:
    """Tokens a second over all prompts, each continued by every engine in turn."""
    import transformers

    from training.mamba import HELD_OUT, standard_library

    model = pyspec.load(folder, dtype=DTYPES[dtype], device="cpu")
    other = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).eval()
    unseen = standard_library()[HELD_OUT - 1 :: HELD_OUT]
    texts = [text[:PROMPT_CHARACTERS] for text in unseen if len(text) > 2 * PROMPT_CHARACTERS][:PROMPTS]
    prompts = [model.tokenizer.encode(text[: text.rfind("\n") + 1] or text) for text in texts]

    def by_transformers(prompt: list[int]) -> list[int]:
        tokens = torch.tensor([prompt])
        options = {"do_sample": False, "max_new_tokens": new_tokens, "attention_mask": torch.ones_like(tokens)}
        return other.generate(tokens, **options)[0, len(prompt) :].tolist()

    engines: dict[str, Callable[[list[int]], list[int]]] = {
        drafter or "plain": lambda prompt, drafter=drafter: (
            pyspec.generate(model, prompt, drafter=drafter, max_new_tokens=new_tokens).tokens
        )
        for drafter in (None, "lookup", "merged")
    }
    engines["transformers"] = by_transformers
    for engine in engines.values():
        engine(prompts[0])  # warms up
    seconds, made, equal = ({name: 0 for name in engines} for _ in range(3))
    for prompt in prompts:
        outputs = {}
        for name, engine in engines.items():
            start = time.perf_counter()
            outputs[name] = engine(prompt)
            seconds[name] += time.perf_counter() - start
            made[name] += len(outputs[name])
            equal[name] += outputs[name] == outputs["plain"]
    rates = {name: made[name] / seconds[name] for name in engines}
    return {"model": folder, "weights": dtype, "tokens_per_second": rates, "equal_to_plain": equal}


def show(console, found: dict, sizes=SIZES) -> None:
    over, model, batch = found["over_plain"], found["model"], found["batch"]
    title = f"{model}, {found['weights']}, batch {batch}: a round over a plain step (floor in bytes)"
    table = measure.new_table("nodes", "replay", "goal", *WAYS[1:], left=0, title=title)
    floors = found["floor_over_plain"]
    for nodes in sizes:
        goal = GOALS.get((model, batch, nodes)) if found["weights"] == "bf16" else None
        cells = [f"{over[f'{way} {nodes}']:.2f}x ({floors[f'{way} {nodes}']:.2f})" for way in WAYS]
        table.add_row(str(nodes), cells[0], "" if goal is None else f"at most {goal:.2f}x", *cells[1:])
    console.print(table)
    plain, floor = found["seconds"]["replay 1"] * 1e3, found["floor_seconds"] * 1e3
    megabytes = (found["bytes"]["weights"] + found["bytes"]["state"]) / 1e6
    console.print(
        f"plain step {plain:.1f} ms, {found['plain_over_floor']:.2f}x the floor (goal: at most {FLOOR_GOAL}x) of "
        f"{floor:.1f} ms: {megabytes:.0f} MB at {found['bytes_per_second'] / 1e9:.1f} GB/s"
    )
    if "transformers 1" in over:
        console.print(f"transformers' step: {over['transformers 1']:.1f}x ours (goal: at least {PEER_GOAL:.0f}x)")
    if batch == 16 and "snapshots 6" in over:
        ratio = over["snapshots 6"] / over["replay 6"]
        goal = f" (goal: at least {SNAPSHOT_GOAL}x)" if model == "Mamba-2 130M" else ""
        console.print(f"snapshots of 6 nodes take {ratio:.2f}x the time of a replay{goal}")


def show_texts(console, found: dict) -> None:
    rates = found["tokens_per_second"]
    console.print(f"{found['model']}, {found['weights']}: {PROMPTS} texts continued, tokens a second")
    for name, rate in rates.items():
        goal = f", goal {TEXT_GOAL}x" if name == "lookup" else ""
        same = f"{found['equal_to_plain'][name]} texts are plain decoding's"
        console.print(f"  {name:14}{rate:8.1f}  {rate / rates['plain']:.2f}x plain{goal}; {same}")


def main() -> None:
    parser = parser_of(__doc__, repeats=7, devices=True)
    parser.add_argument("--models", nargs="*", choices=SHAPES, default=["Mamba-2 130M", "Mamba-2 370M", "Mamba 130M"])
    parser.add_argument("--trained", nargs="*", default=[], metavar="FOLDER", help="models of training.mamba")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--batches", nargs="+", type=positive, default=list(BATCHES))
    parser.add_argument("--new-tokens", type=positive, default=128, help="of a text that is continued")
    options = parse(parser)
    from rich.console import Console

    console, results, texts = Console(highlight=False), [], []
    for name, dtype, batch in product(options.models, options.dtypes, options.batches):
        results.append(run(name, dtype, batch, options.repeats, options.device))
        show(console, results[-1])
    for folder, dtype in product(options.trained, options.dtypes):
        model = pyspec.load(folder, dtype=DTYPES[dtype], device=options.device)
        for batch in options.batches:
            results.append(time_rounds(folder, model, None, dtype, batch, options.repeats))
            show(console, results[-1])
        texts.append(continue_texts(folder, dtype, options.new_tokens))
        show_texts(console, texts[-1])
    result = {"machine": measure.machine(), "device": options.device, "results": results, "texts": texts}
    print(f"wrote {measure.save(f'selective_state_{options.device}', result)}")


if __name__ == "__main__":
    main()
