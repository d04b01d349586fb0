"""Trains what chooses a drafter for a request: the policy of "context_aware", and clusters and vectors of "uniroute".

    python -m training.routing --prompts bench/data/spec_bench_dev.jsonl --drafter merged suffix recycling

Rounds of all drafters are recorded on the prompts of even places of each category. What a drafter gives for a prompt is
its speed over plain decoding at the best fixed number of nodes, less 1, by costs of rounds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

import pyspec
from pyspec.controllers import LARGEST, Controller
from pyspec.controllers.trained import FOLDER, write
from pyspec.drafters import DRAFTERS, new_drafter
from pyspec.machine.experience import described
from pyspec.machine.running_costs import NODES
from pyspec.measure.prompts import first_of_each_category, of_lines
from pyspec.measure.replays import Machine, RecordedRound, record, replay
from training.stop_rules import COSTS, even_places

__all__ = ["clusters", "gains_of", "policy"]

HIDDEN, STEPS, RATE, DECAY = 16, 400, 0.01, 0.05  # there are few prompts, so weights decay a lot
CLUSTERS, TURNS = 6, 30
PROPOSAL = 0.02  # plain steps of a proposal of tables


def gains_of(texts: Sequence[Mapping[str, Sequence[RecordedRound]]], machines: Mapping[str, Machine]) -> np.ndarray:
    """[N, A]: what each drafter gives for each text."""
    found = []
    for text in texts:
        speeds = [
            [len(rounds) / replay(rounds, Controller(nodes), machines[name]).steps for nodes in NODES[1:]]
            for name, rounds in text.items()
        ]
        found.append([max(of_drafter) - 1 for of_drafter in speeds])
    return np.array(found, np.float32)


def policy(features: np.ndarray, gains: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """The arrays of "context_aware" for features [N, F] and gains [N, A]: the largest expected gain, exactly."""
    torch.manual_seed(seed)
    arms = torch.from_numpy(np.pad(gains, ((0, 0), (0, 1))))  # plain decoding gives nothing
    network = nn.Sequential(nn.Linear(features.shape[1], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, arms.shape[1]))
    optimiser = torch.optim.AdamW(network.parameters(), RATE, weight_decay=DECAY)
    inputs = torch.from_numpy(features)
    for _ in range(STEPS):
        optimiser.zero_grad()
        (-(network(inputs).softmax(1) * arms).sum(1).mean()).backward()
        optimiser.step()
    first, _, second = network
    found = {"first": first.weight, "first_bias": first.bias, "second": second.weight, "second_bias": second.bias}
    return {name: each.detach().numpy() for name, each in found.items()}


def clusters(features: np.ndarray, gains: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """The arrays of "uniroute": centres by k-means of features over their deviations, and the mean gains in each."""
    scale = 1 / np.maximum(features.std(axis=0), 1e-3)
    rows, draw = features * scale, np.random.default_rng(seed)
    centres = rows[draw.choice(len(rows), min(CLUSTERS, len(rows)), replace=False)]
    for _ in range(TURNS):
        nearest = ((rows[:, None] - centres) ** 2).sum(axis=2).argmin(axis=1)
        members = [nearest == each for each in range(len(centres))]
        centres = np.stack(
            [rows[of].mean(axis=0) if of.any() else old for of, old in zip(members, centres, strict=True)]
        )
    # a cluster of few is taken to be a little like all
    vectors = [(gains[of].sum(axis=0) + gains.mean(axis=0)) / (of.sum() + 1) for of in members]
    return {"centres": centres, "scale": scale, "vectors": np.stack(vectors)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--drafter", nargs="+", choices=list(DRAFTERS), required=True, help="two or more")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines, see pyspec bench")
    parser.add_argument("--limit", type=int, default=10, help="prompts of a category, of which every other is taken")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of demo_<controller>.safetensors")
    arguments = parser.parse_args()
    model = pyspec.load(arguments.model)
    drafters = {name: new_drafter(name, model) for name in arguments.drafter}
    prompts = list(of_lines(arguments.prompts.read_text(encoding="utf-8"), str(arguments.prompts)))
    recordings = [
        record(model, prompt.tokens(model), drafters, nodes=LARGEST, max_new_tokens=arguments.max_new_tokens)
        for prompt in even_places(first_of_each_category(prompts, arguments.limit))
    ]
    features = np.stack([one.features for one in recordings])
    gains = gains_of([one.rounds for one in recordings], dict.fromkeys(drafters, Machine(COSTS, proposal=PROPOSAL)))
    names = json.dumps([described(drafter) for drafter in drafters.values()])
    for controller, arrays in (("context_aware", policy(features, gains)), ("uniroute", clusters(features, gains))):
        write(arguments.output / f"demo_{controller}.safetensors", controller, names, arrays)


if __name__ == "__main__":
    main()
