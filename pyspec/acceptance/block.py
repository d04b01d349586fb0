"""Rule E: block verification, which judges a chain as a whole."""

from __future__ import annotations

import numpy as np

from pyspec.acceptance import RULES
from pyspec.acceptance.laws import LawRule, residual
from pyspec.sampling.noise import Noise
from pyspec.sampling.sampler import InvalidLogits
from pyspec.tree import Accepted, DraftTree


def block_verification(tree: DraftTree, p, q, noise: Noise) -> Accepted:
    """Judges a chain of drafts x_1 .. x_L, with p_i and q_i the laws after x_1 .. x_i::

        r_0 = 1, r_i = min(1, r_{i-1} p_{i-1}(x_i) / q_{i-1}(x_i))
        s_i = sum of [r_i p_i - q_i]+,  h_i = s_i / (s_i + 1 - r_i) for i < L,  h_L = r_L

    keep the largest i whose own coin of probability h_i says so (h_0 = 1), and emit a token of [r_i p_i - q_i]+,
    normalised, or of p_L. Sun et al., "Block Verification Accelerates Speculative Decoding", arXiv 2403.10444.

    Args:
        tree: a chain; a node whose p is no law ends it.
        p, q: by node, [V] float64 laws of target and drafter.
    """
    tokens = tree.tokens.tolist()
    if tree.parents.tolist() != list(range(-1, len(tokens) - 1)):
        raise ValueError(f"tree must be a chain, got parents {tree.parents.tolist()}")
    rates, laws = [1.0], []
    for node, token in enumerate(tokens[1:]):
        try:
            target, draft = p[node], q[node]
        except InvalidLogits:
            break
        laws.append((target, draft))
        rates.append(min(1.0, rates[node] * target[token] / draft[token]))
    last = len(laws)
    if last == 0 or noise.coin(rates[last]):
        return Accepted(list(range(last + 1)), noise.draw(p[last]))
    for node in range(last - 1, -1, -1):
        target, draft = laws[node]
        excess = float(np.maximum(rates[node] * target - draft, 0).sum())
        chance = excess / (excess + 1 - rates[node]) if excess > 0 else 0.0
        if node == 0 or noise.coin(chance):
            return Accepted(list(range(node + 1)), noise.draw(residual(rates[node] * target, draft)))
    raise AssertionError("node 0 is always kept")


class BlockVerification(LawRule):
    """The acceptance rule of block_verification."""

    siblings = frozenset({"none"})

    def judge(self, tree: DraftTree, p, q, noise: Noise) -> Accepted:
        return block_verification(tree, p, q, noise)


RULES.register("block", BlockVerification, "E: a drawn chain; exact law (arXiv 2403.10444)")
