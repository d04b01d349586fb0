"""Trains the stop rules that are classifiers, "disco" and "multi_candidate", for a trained head.

    python -m training.stop_rules disco --prompts bench/data/spec_bench_dev.jsonl --draft-head models/demo-draft

Rounds of the head are recorded on the prompts of even places of each category. Every node of a recorded tree whose law
the head was asked for is an example: is one of its children right? Of a level: is one of its nodes' children? A network
of one hidden layer learns that with a logistic loss on four fifths of the texts, and the threshold is the one by which
the others, played back, are decoded fastest at the costs that are given.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

import pyspec
from pyspec.controllers import LARGEST, disco, multi_candidate
from pyspec.controllers.stop_rule import StopRule
from pyspec.controllers.trained import FOLDER, Classifier, write
from pyspec.drafters.eagle3 import Eagle3
from pyspec.drafters.shapes import Level
from pyspec.machine.costs import Costs
from pyspec.measure.prompts import first_of_each_category, of_lines
from pyspec.measure.replays import Machine, PlayedDrafter, RecordedRound, level_of, record, replay

__all__ = ["examples", "fit", "threshold_of", "train"]

HIDDEN = 16
STEPS, RATE = 600, 0.02  # of Adam, on all examples at once
THRESHOLDS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
COSTS = Costs((1, 8, 16, 32), (1.0, 1.16, 1.4, 2.1))  # plain steps, see pyspec/machine/running_costs.py
LEVEL = 0.1  # plain steps of a level of the head

RULES = {rule.name: rule for rule in (disco.Disco, multi_candidate.MultiCandidate)}

Texts = Sequence[Sequence[RecordedRound]]


def examples(rule: str, texts: Texts) -> tuple[np.ndarray, np.ndarray]:
    """Features [N, F] and whether drafting on was right [N], of all recorded levels."""
    rows, right = [], []
    for rounds in texts:
        for one in rounds:
            for nodes, level in _levels(one):
                is_right = [any(int(one.tree.parents[node]) == each for node in one.path[1:]) for each in nodes]
                if rule == "disco":
                    rows += list(disco.features(level))
                    right += is_right
                else:
                    rows.append(multi_candidate.features(level))
                    right.append(any(is_right))
    return np.array(rows, np.float32), np.array(right, np.float32)


def _levels(one: RecordedRound) -> Iterator[tuple[list[int], Level]]:
    depths = one.tree.depths.tolist()
    for depth in sorted({depths[node] for node in one.laws}):
        nodes = [node for node in sorted(one.laws) if depths[node] == depth]
        yield nodes, level_of(one.tree, one.laws, nodes)


def fit(rows: np.ndarray, right: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """The arrays of a Classifier that has learned some examples."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(rows.shape[1], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))
    optimiser = torch.optim.Adam(network.parameters(), RATE, weight_decay=1e-4)
    inputs, targets = torch.from_numpy(rows), torch.from_numpy(right)
    for _ in range(STEPS):
        optimiser.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(network(inputs)[:, 0], targets).backward()
        optimiser.step()
    first, _, second = network
    found = {"first": first.weight, "first_bias": first.bias, "second": second.weight[0], "second_bias": second.bias}
    return {name: each.detach().numpy() for name, each in found.items()}


def threshold_of(rule: str, arrays: dict[str, np.ndarray], texts: Texts, machine: Machine) -> tuple[float, float]:
    """The threshold by which some texts are decoded fastest, and their speed over plain decoding."""
    found = []
    for threshold in THRESHOLDS:
        steps = tokens = 0.0
        for rounds in texts:
            drafter = PlayedDrafter("head", "any")
            controller = _rule_of(rule, arrays, threshold, drafter)
            replayed = replay(rounds, controller, machine, drafter)
            steps, tokens = steps + replayed.steps, tokens + replayed.tokens
        found.append((tokens / steps, threshold))
    speed, threshold = max(found)
    return threshold, speed


def _rule_of(rule: str, arrays, threshold: float, drafter: PlayedDrafter):
    """A rule that has no file yet."""
    kind = RULES[rule]
    made = kind.__new__(kind)
    StopRule.__init__(made, None, drafter, None, LARGEST)
    made.threshold = threshold
    made.chance = Classifier(arrays, arrays["first"].shape[1])
    return made


def train(
    rule: str, texts: Texts, machine: Machine, say: Callable[[str], None] = print
) -> tuple[dict[str, np.ndarray], float]:
    """The arrays and the threshold of a rule, of recorded texts; every fifth one is for the threshold."""
    held = [rounds for place, rounds in enumerate(texts) if place % 5 == 4]
    rows, right = examples(rule, [rounds for place, rounds in enumerate(texts) if place % 5 != 4])
    arrays = fit(rows, right)
    other_rows, other_right = examples(rule, held)
    chances = Classifier(arrays, rows.shape[1])(other_rows)
    threshold, speed = threshold_of(rule, arrays, held, machine)
    loss = -np.mean(np.log(np.where(other_right > 0, chances, 1 - chances)))
    base = other_right.mean()
    entropy = -(base * np.log(base) + (1 - base) * np.log(1 - base))
    say(
        f"{len(rows)} examples, {right.mean():.1%} of them right; loss {loss:.3f} nats on {len(other_rows)} others, "
        f"{entropy:.3f} without features; threshold {threshold}, {speed:.3f}x plain decoding"
    )
    return arrays, threshold


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rule", choices=RULES)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--draft-head", required=True, metavar="HEAD")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines, see pyspec bench")
    parser.add_argument("--limit", type=int, default=10, help="prompts of a category, of which every other is taken")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--output", type=Path, help="default: where the demo's is")
    arguments = parser.parse_args()
    model = pyspec.load(arguments.model)
    head = Eagle3(arguments.draft_head, model, tables=())
    prompts = list(of_lines(arguments.prompts.read_text(encoding="utf-8"), str(arguments.prompts)))
    texts = []
    for prompt in even_places(first_of_each_category(prompts, arguments.limit)):
        found = record(
            model, prompt.tokens(model), {"head": head}, nodes=LARGEST, max_new_tokens=arguments.max_new_tokens
        )
        texts.append(found.rounds["head"])
    arrays, threshold = train(arguments.rule, texts, Machine(COSTS, level=LEVEL))
    output = FOLDER / f"demo_{arguments.rule}.safetensors" if arguments.output is None else arguments.output
    write(output, arguments.rule, head.fingerprint, arrays, threshold=threshold)


def even_places(prompts: Sequence) -> list:
    """The first, third, fifth prompt of each category: the others are for measuring."""
    seen: dict[str, int] = {}
    kept = []
    for prompt in prompts:
        seen[prompt.category] = seen.get(prompt.category, -1) + 1
        if seen[prompt.category] % 2 == 0:
            kept.append(prompt)
    return kept


if __name__ == "__main__":
    main()
