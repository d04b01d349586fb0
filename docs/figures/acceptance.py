"""Draws docs/figures/acceptance.png: accepted drafts by rule and tree, for a good, a middling and a bad drafter."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from pyspec.acceptance.block import block_verification
from pyspec.acceptance.k_seq import k_seq
from pyspec.acceptance.recursive import recursive_rejection
from pyspec.acceptance.target_roots import target_roots
from pyspec.acceptance.traversal import traversal_verification
from pyspec.acceptance.with_replacement import with_replacement
from pyspec.drafters.shapes.dyspec import DySpecGreedy
from pyspec.drafters.shapes.reranked import TopPaths
from pyspec.drafters.shapes.static import FixedBranching
from pyspec.drafters.shapes.stochastic_beam import StochasticBeam
from pyspec.sampling.noise import Noise

VOCAB_SIZE, ROUNDS, BUDGET = 50, 1500, 9
LIKENESS = (0.9, 0.6, 0.3)  # the share of q that is p, the rest being unrelated to it
CHAIN, PAIRS = (1,) * (BUDGET - 1), (2, 1, 1, 1)
INDEPENDENT = "with replacement"


def exact(tree, p, q, noise):
    """Rule A: with one draw at the root, target_roots is the exact walk."""
    return target_roots(tree, p, noise, 1)


CASES = (
    ("chain", FixedBranching(CHAIN), (("A", exact), ("B, C", recursive_rejection), ("E, F", block_verification))),
    ("2, 1, 1, 1 independent", FixedBranching(PAIRS, INDEPENDENT), (("B", with_replacement), ("D", k_seq))),
    ("RSD-C 2, 1, 1, 1", FixedBranching(PAIRS), (("C", recursive_rejection), ("F", traversal_verification))),
    ("RSD-S 2 x 4", StochasticBeam(2, 4), (("C", recursive_rejection), ("F", traversal_verification))),
    ("DySpec", DySpecGreedy(), (("C", recursive_rejection), ("F", traversal_verification))),
    ("re-ranked top paths", TopPaths(4, 6), (("A", exact),)),
)
COLOURS = {
    "A": "0.7",
    "B": "#b8cfe6",
    "B, C": "#6a9bd1",
    "C": "#6a9bd1",
    "D": "#3f6ea5",
    "E, F": "#e08e45",
    "F": "#e08e45",
}


class Models:
    """Target and drafter of one round: sharp laws that depend on the path."""

    vocab_size = VOCAB_SIZE

    def __init__(self, seed: int, likeness: float):
        self._seed, self._likeness, self._rows = seed, likeness, {}

    def both(self, text: tuple) -> tuple[np.ndarray, np.ndarray]:
        if text not in self._rows:
            generator = np.random.default_rng([self._seed, *text])
            p, other = generator.dirichlet(np.full(VOCAB_SIZE, 0.05), 2)
            self._rows[text] = p, self._likeness * p + (1 - self._likeness) * other
        return self._rows[text]

    def laws(self, tokens, parents, nodes):
        texts = texts_of(tokens, parents)
        return np.stack([self.both(texts[node])[1] for node in nodes])


def texts_of(tokens, parents) -> list[tuple]:
    texts = [()]
    for token, parent in zip(tokens[1:], parents[1:], strict=True):
        texts.append((*texts[parent], token))
    return texts


def accepted(policy, rules, likeness: float) -> list[float]:
    """Mean accepted drafts by rule, all rules judging the same trees."""
    totals = np.zeros(len(rules))
    for seed in range(ROUNDS):
        models = Models(seed, likeness)
        tree = policy.grow(models, 0, BUDGET, Noise(seed, 0, Noise.DRAFTS))
        texts = texts_of(tree.tokens.tolist(), tree.parents.tolist())
        p, q = map(np.stack, zip(*(models.both(text) for text in texts), strict=True))
        totals += [len(rule(tree, p, q, Noise(seed, 0, Noise.ACCEPTANCE)).path) - 1 for _, rule in rules]
    return (totals / ROUNDS).tolist()


figure, axes = plt.subplots(1, len(LIKENESS), figsize=(12, 4), sharey=True)
for axis, likeness in zip(axes, LIKENESS, strict=True):
    place, ticks = 0.0, []
    for name, policy, rules in CASES:
        start = place
        for (rule, _), mean in zip(rules, accepted(policy, rules, likeness), strict=True):
            axis.barh(place, mean, color=COLOURS[rule], height=0.9)
            axis.text(mean + 0.03, place, f"{rule}   {mean:.2f}", va="center", fontsize=7)
            place += 1
        ticks.append(((start + place - 1) / 2, name))
        place += 0.6
    axis.set_yticks(*zip(*ticks, strict=True), fontsize=8)
    axis.invert_yaxis()
    axis.set_title(f"q is {likeness:.0%} p", fontsize=9)
    axis.set_xlabel("accepted drafts a round", fontsize=8)
    axis.margins(x=0.25)
    axis.spines[["top", "right"]].set_visible(False)
figure.suptitle(
    f"Accepted drafts of at most {BUDGET - 1}, by tree and rule (made-up laws of {VOCAB_SIZE} tokens)", fontsize=10
)
figure.tight_layout()
figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)
