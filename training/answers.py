"""Trains the rule "learned" of pyspec.cascade, and a router: who should answer, by how two models did on tasks.

    python -m training.answers --small models/small --large demo --output answers.npz --router routes.npz

Both models answer short tasks (or those of a JSON lines file with "prompt" and "answer"). The rule learns from the
small model's log probabilities where the large one is right and the small one is not; the router learns from clusters
of prompts. `pyspec cascade --rule learned --setting file=answers.npz` and `--rule uniroute --setting
router=routes.npz` use them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import pyspec
from pyspec.answers.learned import features_of
from pyspec.generate import generate
from pyspec.measure.tasks import Task, tasks
from pyspec.runners import Runner
from pyspec.turns.uniroute import Router

__all__ = ["Answered", "answered", "fit", "main", "router_of"]

UNITS, STEPS = 8, 400
DECAY = 1e-2  # of weights: there are few answers to learn from
CLUSTERS = 4


class Answered(NamedTuple):
    """What a model said to a task.

    Attributes:
        prompt: token ids.
        logprobs: [n] float64 of its tokens.
        is_right: whether it answered the task.
    """

    prompt: list[int]
    logprobs: np.ndarray
    is_right: bool


def answered(model: Runner, asked: Sequence[Task], max_new_tokens: int = 24) -> list[Answered]:
    """What a model says greedily to tasks, up to a line feed."""
    found = []
    for task in asked:
        prompt = model.tokenizer.encode(task.prompt)
        said = generate(model, prompt, max_new_tokens=max_new_tokens, stop="\n", logprobs=0)
        logprobs = np.array([each.logprob for each in said.logprobs])
        found.append(Answered(prompt, logprobs, task.is_right(said.text)))
    return found


def fit(small: Sequence[Answered], large: Sequence[Answered], seed: int = 0) -> dict[str, np.ndarray]:
    """The arrays of a LearnedRule that tells where the large model is right and the small one is not."""
    features = torch.from_numpy(np.stack([features_of(each.logprobs) for each in small]))
    pays = [theirs.is_right and not ours.is_right for ours, theirs in zip(small, large, strict=True)]
    wanted = torch.tensor(pays, dtype=torch.float64)
    mean, scale = features.mean(0), features.std(0, correction=0).clamp_min(1e-6)
    torch.manual_seed(seed)
    network = torch.nn.Sequential(
        torch.nn.Linear(features.shape[1], UNITS), torch.nn.Tanh(), torch.nn.Linear(UNITS, 1)
    ).double()
    optimiser = torch.optim.AdamW(network.parameters(), lr=0.02, weight_decay=DECAY)
    for _ in range(STEPS):
        logits = network((features - mean) / scale)[:, 0]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    inner, _, outer = network
    arrays = {
        "mean": mean,
        "scale": scale,
        "hidden": inner.weight,
        "hidden_bias": inner.bias,
        "out": outer.weight[0],
        "out_bias": outer.bias[0],
    }
    return {name: array.detach().numpy() for name, array in arrays.items()}


def router_of(small: Sequence[Answered], large: Sequence[Answered], cost: float, clusters: int = CLUSTERS) -> Router:
    """A router between the two. cost: of the small model, where the large one's is 1."""
    prompts = [each.prompt for each in small]
    router = Router(prompts, clusters)
    for name, found, price in (("small", small, cost), ("large", large, 1.0)):
        router.add(name, prompts, [1.0 - each.is_right for each in found], price)
    return router


def _tasks_of(path: Path) -> list[Task]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for number, line in enumerate(lines, start=1):
        if not {"prompt", "answer"} <= line.keys():
            raise ValueError(f"{path}, line {number} must have prompt and answer, got {sorted(line)}")
    return [Task("file", line["prompt"], line["answer"]) for line in lines]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", required=True, help="as for pyspec.load")
    parser.add_argument("--large", default="demo", help="default: demo")
    parser.add_argument("--tasks", type=Path, help="JSON lines with prompt and answer; default: sums and copies")
    parser.add_argument("--count", type=int, default=200, help="of sums and copies; default: 200")
    parser.add_argument(
        "--cost", type=float, default=0.5, help="of the small model; the large one's is 1; default: 0.5"
    )
    parser.add_argument("--output", type=Path, required=True, help="of the rule")
    parser.add_argument("--router", type=Path, help="of the router, where one is wanted")
    options = parser.parse_args(argv)
    asked = tasks(options.count) if options.tasks is None else _tasks_of(options.tasks)
    small, large = (answered(pyspec.load(source), asked) for source in (options.small, options.large))
    with open(options.output, "wb") as file:
        np.savez(file, **fit(small, large))
    if options.router is not None:
        router_of(small, large, options.cost).save(options.router)
    rights = [sum(each.is_right for each in found) for found in (small, large)]
    print(f"{len(asked)} tasks, right: small {rights[0]}, large {rights[1]}; wrote {options.output}")


if __name__ == "__main__":
    main()
