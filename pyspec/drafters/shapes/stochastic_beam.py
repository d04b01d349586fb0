"""RSD-S: the width likeliest-to-come-first paths of every level, by stochastic beam search."""

from __future__ import annotations

import heapq

from pyspec.drafters.shapes import Growing, GrowthPolicy, Sapling
from pyspec.sampling.noise import Noise


class StochasticBeam(GrowthPolicy):
    """Draws `width` different paths of each length from the drafter's law, without replacement.

    The paths of a length are drawn as by a race: path x arrives at a time with rate q(x), and the first ones are taken.
    A node arrives when the first path through it does, so a node's first child arrives with it, and another one after
    an exponential wait at the rate of what its law has left; which token that is, is a draw from what is left. So
    whether a child is taken depends on times alone, never on its token. This is the search of Kool et al.,
    arXiv 1903.06059, as Jeon et al., arXiv 2402.14160, use it (their perturbed score is -log time), without a Gumbel
    number for every token.

    Args:
        width: paths of each level, at least 1.
        depth: levels below the root, at least 1.
    """

    proposal = "sampled"

    def __init__(self, width: int, depth: int):
        for name, value in (("width", width), ("depth", depth)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.width = width
        self.depth = depth
        self.siblings = "none" if width == 1 else "without replacement"

    def growing(self, sapling: Sapling, noise: Noise) -> Growing:
        """When the budget is used up, the last level has the first of its paths."""
        beams = [(0.0, 0)]  # (arrival, node)
        for _ in range(self.depth):
            if not sapling.room:
                break
            asked = [node for _, node in beams]
            yield asked
            laws = sapling.laws(asked)
            # of each beam, when its next child arrives, and what its law has left
            race = [
                (arrival, node, law.copy())
                for (arrival, node), law, goes_on in zip(beams, laws, sapling.goes_on(asked), strict=True)
                if goes_on
            ]
            beams = []
            heapq.heapify(race)
            while race and len(beams) < self.width and sapling.room:
                arrival, node, left = heapq.heappop(race)
                child = noise.draw(left)
                beams.append((arrival, sapling.add(node, child)))
                left[child] = 0
                if (rate := sapling.chances[node] * float(left.sum())) > 0:
                    heapq.heappush(race, (arrival + noise.exponential() / rate, node, left))
        return sapling.drawn()
