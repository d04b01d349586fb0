"""Recorded rounds, and what a controller would have made of them: no clock, so the same figures every time.

At every token of a text a drafter proposes a tree, and what of it is right is noted; then the text goes on by that one
token. A controller may then take any size of tree anywhere, and what it takes is counted by a table of costs. What the
drafter would have learned from drafts that were wrong is the one thing that is not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pyspec.acceptance.exact import ExactAcceptance
from pyspec.controllers import Controller
from pyspec.drafters import Drafter
from pyspec.generate import generate
from pyspec.machine.costs import Costs
from pyspec.runners import Runner
from pyspec.runners.verified import Verified
from pyspec.sampling.sampler import Sampler
from pyspec.tree import Accepted, DraftTree

FIRST_OF_A_SIZE = 0.5  # plain steps that recording the first round of a size takes


class RecordedRound(NamedTuple):
    """What was proposed at one token of a text.

    Attributes:
        tree: as large as the budget of the recording.
        path: its nodes that the text goes through, root included.
    """

    tree: DraftTree
    path: tuple[int, ...]


@dataclass(frozen=True)
class Machine:
    """What rounds take, in plain steps.

    Args:
        costs: of a verification by its nodes.
        drafting: of a proposal by the nodes asked for; plain decoding proposes nothing.
    """

    costs: Costs
    drafting: Callable[[int], float] = lambda nodes: 0.0


class Replayed(NamedTuple):
    """What a controller made of recorded rounds: tokens, rounds, and plain steps that they took."""

    tokens: int
    rounds: int
    steps: float


class _LearnsEmitted:
    """A drafter that is told of the rows behind emitted tokens alone: those of drafts would tell it the next tokens."""

    proposal = "deterministic"

    def __init__(self, drafter: Drafter):
        self._drafter = drafter
        self.taps = getattr(drafter, "taps", None)

    def start(self, prompt: Sequence[int]) -> _LearnsEmitted:
        return _LearnsEmitted(self._drafter.start(prompt))

    def propose(self, context: Sequence[int], budget: int) -> DraftTree:
        return self._drafter.propose(context, budget)

    def observe(self, tree: DraftTree, verified: Verified, path: Sequence[int]) -> None:
        emitted = len(path)  # all of a prompt, or the root
        taps = None if verified.taps is None else verified.taps[:emitted]
        self._drafter.observe(tree.first(emitted), Verified(verified.logits[:emitted], taps=taps), path)


class _OneTokenARound(ExactAcceptance):
    """Notes what the exact rule would accept, and accepts one token."""

    def __init__(self):
        self.rounds: list[RecordedRound] = []

    def accept(self, tree: DraftTree, verified: Verified, sampler: Sampler, position: int) -> Accepted:
        accepted = super().accept(tree, verified, sampler, position)
        self.rounds.append(RecordedRound(tree, tuple(accepted.path)))
        return Accepted([0], accepted.tokens(tree)[0])


def record(model: Runner, tokens: Sequence[int], drafter: Drafter, *, nodes: int, max_new_tokens: int, **settings):
    """The rounds of one text, a RecordedRound for every token but the first, which the prompt gives.

    Args:
        drafter: with deterministic proposals; it learns from every token, but not from its other drafts.
        nodes: of the trees.
        settings: of generate, others than these.
    """
    rule = _OneTokenARound()
    generate(
        model,
        tokens,
        drafter=_LearnsEmitted(drafter),
        budget=nodes,
        acceptance=rule,
        max_new_tokens=max_new_tokens,
        **settings,
    )
    return rule.rounds[1:]


def replay(rounds: Sequence[RecordedRound], controller: Controller, machine: Machine) -> Replayed:
    """What a controller makes of the rounds of one text on a machine."""
    place = count = 0
    steps, seen = 0.0, set()
    while place < len(rounds):
        nodes = controller.nodes
        (tree,) = controller.cut([rounds[place].tree.first(nodes)])
        path = [node for node in rounds[place].path if node < len(tree)][: len(rounds) - place]
        drafting, verifying = machine.drafting(nodes) if nodes > 1 else 0.0, float(machine.costs(len(tree)))
        if len(tree) not in seen:
            seen.add(len(tree))
            verifying += FIRST_OF_A_SIZE
        controller.learn([tree], [path], drafting, verifying)
        steps += drafting + verifying
        place += len(path)
        count += 1
    return Replayed(len(rounds), count, steps)


def total(replayed: Iterable[Replayed]) -> Replayed:
    """The sums over several texts."""
    return Replayed(*map(sum, zip(*replayed, strict=True)))
