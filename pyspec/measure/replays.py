"""Recorded rounds, and what a controller would have made of them: no clock, so the same figures every time.

At every token of a text a drafter proposes a tree, and what of it is right is noted; the text is plain decoding's own.
A controller may then take any size of tree anywhere, and end branches by the laws that were noted, and what it takes is
counted by a table of costs. What the drafter would have learned from drafts that were wrong is not in it, nor is what a
branch that ends earlier would have left room for.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np

from pyspec.controllers import Controller
from pyspec.controllers.prompt_features import PromptFeatures
from pyspec.drafters import Drafter
from pyspec.drafters.several import Several
from pyspec.drafters.shapes import Level
from pyspec.generate import Generation, generate
from pyspec.machine.costs import Costs
from pyspec.machine.experience import described
from pyspec.runners import Runner
from pyspec.runners.verified import Verified
from pyspec.tree import DraftTree

FIRST_OF_A_SIZE = 0.5  # plain steps that recording the first round of a size takes


class Law(NamedTuple):
    """What a level said of one node: its best chances [8] and its entropy in nats."""

    top: np.ndarray
    entropy: float


class RecordedRound(NamedTuple):
    """What was proposed at one token of a text.

    Attributes:
        tree: as large as the budget of the recording.
        path: its nodes that the text goes through, root included.
        laws: by node, of those below which the drafter asked for children; {} of a drafter that has none.
        seconds: that the proposal took.
    """

    tree: DraftTree
    path: tuple[int, ...]
    laws: Mapping[int, Law] = {}
    seconds: float = 0.0


@dataclass(frozen=True)
class Machine:
    """What rounds take, in plain steps.

    Args:
        costs: of a verification by its nodes.
        proposal: of a proposal, whatever its size; plain decoding proposes nothing.
        level: of each level of a tree below which a drafter with laws asked for children.
    """

    costs: Costs
    proposal: float = 0.0
    level: float = 0.0


class Replayed(NamedTuple):
    """What a controller made of recorded rounds: tokens, rounds, and plain steps that they took.

    deciding is the one thing by the clock: seconds that the controller itself took, which steps leave out.
    """

    tokens: int
    rounds: int
    steps: float
    deciding: float = 0.0


@dataclass
class Recording:
    """The rounds of one text, one for every token but the first, which the prompt gives; by drafter.

    features are those of its prompt, see PromptFeatures.
    """

    text: Generation
    features: np.ndarray
    rounds: dict[str, list[RecordedRound]] = field(default_factory=dict)


class _Recorder:
    """Has several drafters propose at every token, and proposes nothing itself.

    They are told of the rows behind emitted tokens alone: those of drafts would tell them the next tokens.
    """

    proposal = "deterministic"

    def __init__(self, drafters: Mapping[str, Drafter], nodes: int):
        self._drafters, self._nodes = drafters, nodes
        self.proposed: dict[str, list[tuple[DraftTree, dict[int, Law], float]]] = {name: [] for name in drafters}
        self.taps = next((each.taps for each in drafters.values() if getattr(each, "taps", None) is not None), None)
        self._levels: list[Level] = []

    def start(self, prompt: Sequence[int]) -> _Recorder:
        self._drafters = {name: drafter.start(prompt) for name, drafter in self._drafters.items()}
        self.features = PromptFeatures(prompt)
        for drafter in self._drafters.values():
            if hasattr(drafter, "goes_on"):
                drafter.goes_on = partial(_note, self._levels)  # a method of this would keep all of it alive
        return self

    def propose(self, context: Sequence[int], budget: int) -> DraftTree:
        for name, drafter in self._drafters.items():
            self._levels.clear()
            start = time.perf_counter()
            tree = drafter.propose(context, self._nodes)
            seconds = time.perf_counter() - start
            self.proposed[name].append((tree, _laws_of(tree, self._levels), seconds))
        return DraftTree.chain(context[-1:])

    def observe(self, tree: DraftTree, verified: Verified, path: Sequence[int]) -> None:
        self.features.observe(tree, verified)
        for drafter in self._drafters.values():
            drafter.observe(tree, verified, path)


def _note(levels: list[Level], level: Level) -> list[bool]:
    levels.append(level)
    return [True] * len(level.depths)


def _laws_of(tree: DraftTree, levels: Iterable[Level]) -> dict[int, Law]:
    """The laws of the nodes that were kept, which are told by their depths and the chances of their paths."""
    if tree.chances is None:
        return {}
    keys = zip(tree.depths.tolist(), tree.chances.astype(np.float32).tolist(), strict=True)
    nodes: dict[tuple, list[int]] = {}
    for node, key in enumerate(keys):
        nodes.setdefault(key, []).append(node)
    laws = {}
    for level in levels:
        keys = zip(level.depths.tolist(), level.paths.astype(np.float32).tolist(), strict=True)
        for place, key in enumerate(keys):
            if nodes.get(key):
                laws[nodes[key].pop(0)] = Law(level.top[place], float(level.entropy[place]))
    return laws


def record(
    model: Runner,
    tokens: Sequence[int],
    drafters: Mapping[str, Drafter],
    *,
    nodes: int,
    max_new_tokens: int,
    **settings,
) -> Recording:
    """The rounds of one text by each of some drafters.

    Args:
        drafters: by name, with deterministic proposals; they learn from every token, but not from their other drafts.
        nodes: of the trees.
        settings: of generate, others than these.

    Raises:
        ValueError: for a drafter that draws.
        RuntimeError: the text ended by an error.
    """
    for name, drafter in drafters.items():
        if drafter.proposal != "deterministic":
            raise ValueError(f"drafters must choose their drafts to be recorded, but {name} draws them")
    recorder = _Recorder(drafters, nodes)
    text = generate(model, tokens, drafter=recorder, budget=2, max_new_tokens=max_new_tokens, **settings)
    if text.finish_reason == "error":
        raise RuntimeError(text.error)
    recording = Recording(text, recorder.features.values())
    for name, proposed in recorder.proposed.items():
        if text.tokens[1:]:  # nothing is proposed where one token is left
            alone = DraftTree.chain(text.tokens[-2:-1])
            proposed += [(alone, {}, 0.0)] * (len(text.tokens) - 1 - len(proposed))
        recording.rounds[name] = [
            RecordedRound(tree, _path(tree, text.tokens[place + 1 :]), laws, seconds)
            for place, (tree, laws, seconds) in enumerate(proposed)
        ]
    return recording


def _path(tree: DraftTree, text: Sequence[int]) -> tuple[int, ...]:
    """The nodes of a tree that a text goes through; its last token comes from the model whatever was drafted."""
    path = [0]
    for token in text[:-1]:
        child = next((node for node in tree.children(path[-1]) if tree.tokens[node] == token), None)
        if child is None:
            break
        path.append(child)
    return tuple(path)


class PlayedDrafter:
    """Proposes what was recorded, as far as a controller lets it go on.

    Args:
        name: of the recorded drafter.
        fingerprint: of a drafter that has laws of its own; None of any other.
    """

    proposal = "deterministic"
    rounds: Sequence[RecordedRound]  #: of the text that is played
    place = 0  #: in it

    def __init__(self, name: str, fingerprint: str | None = None):
        self.name = name
        self.fingerprint = fingerprint
        self.described = name  #: see pyspec.machine.experience.described
        if fingerprint is not None:
            self.goes_on = None
        self.kept = [0]  #: nodes of the recorded tree that were proposed last
        self.deciding = 0.0  #: seconds that its controller took to say where drafting goes on

    def start(self, prompt: Sequence[int]) -> PlayedDrafter:
        """Itself: what is played is one text."""
        return self

    def propose(self, context: Sequence[int], budget: int) -> DraftTree:
        """The tree of this place in the text, at most so large."""
        recorded = self.rounds[self.place]
        tree = recorded.tree
        stops = budget > 1 and recorded.laws and getattr(self, "goes_on", None) is not None
        self.kept = (self._alive(recorded) if stops else list(range(len(tree))))[:budget]
        if self.kept[-1] < len(self.kept):
            return tree.first(len(self.kept))
        places = {node: place for place, node in enumerate(self.kept)}
        parents = [places.get(parent, -1) for parent in tree.parents[self.kept].tolist()]
        return DraftTree(tree.tokens[self.kept], parents, chances=tree.chances[self.kept])

    def seconds(self, machine: Machine) -> float:
        """Plain steps that the last proposal took, of more than its root."""
        recorded = self.rounds[self.place]
        asked = [depth for node in self.kept if node in recorded.laws for depth in [int(recorded.tree.depths[node])]]
        return machine.proposal + machine.level * (1 + max(asked, default=-1))

    def path(self, nodes: int) -> list[int]:
        """What the text goes through of the first nodes of the last proposal."""
        places = {node: place for place, node in enumerate(self.kept[:nodes])}
        return [places[node] for node in self.rounds[self.place].path if node in places]

    def observe(self, tree: DraftTree, verified: Verified, path: Sequence[int]) -> None:
        """Nothing is learned."""

    def _alive(self, recorded: RecordedRound) -> list[int]:
        """The nodes that are not below one where drafting stops."""
        tree, laws = recorded.tree, recorded.laws
        parents, depths = tree.parents.tolist(), tree.depths.tolist()
        alive, stopped = {0}, set()
        for depth in range(max(depths) + 1):
            asked = [node for node in sorted(alive) if depths[node] == depth and node in laws]
            if asked:
                level = level_of(tree, laws, asked)
                start = time.perf_counter()
                goes_on = self.goes_on(level)
                self.deciding += time.perf_counter() - start
                stopped |= {node for node, goes in zip(asked, goes_on, strict=True) if not goes}
            below = [node for node, parent in enumerate(parents) if depths[node] == depth + 1]
            alive |= {node for node in below if parents[node] in alive and parents[node] not in stopped}
        return sorted(alive)


def level_of(tree: DraftTree, laws: Mapping[int, Law], nodes: Sequence[int]) -> Level:
    """What a drafter said of some nodes of a tree, as a stop rule is told it."""
    paths = tree.chances[nodes].astype(np.float64)
    before = tree.chances[tree.parents[nodes]].astype(np.float64)
    before[tree.depths[nodes] == 0] = 1.0
    chances = np.divide(paths, before, out=np.zeros_like(paths), where=before > 0)
    top = np.stack([laws[node].top for node in nodes])
    return Level(tree.depths[nodes], chances, paths, top, np.array([laws[node].entropy for node in nodes]))


def replay(
    rounds: Sequence[RecordedRound] | Mapping[str, Sequence[RecordedRound]],
    controller: Controller,
    machine: Machine | Mapping[str, Machine],
    drafter: PlayedDrafter | Several | None = None,
    features: np.ndarray | None = None,
) -> Replayed:
    """What a controller makes of the rounds of one text on a machine.

    Args:
        rounds: of one drafter, or of several by name.
        machine: for one drafter, or for several by name.
        drafter: that the controller was made for, see `played`; by default one without laws.
        features: of the prompt, see PromptFeatures.
    """
    drafter = PlayedDrafter("recorded") if drafter is None else drafter
    drafters = drafter.drafters if isinstance(drafter, Several) else [drafter]
    if not isinstance(rounds, Mapping):
        rounds, machine = {drafter.name: rounds}, {drafter.name: machine}
    for each in drafters:
        each.rounds = rounds[each.name]
    controller.start(0, drafter)
    if features is not None:
        drafter.features = _Known(features)
    place = count = 0
    steps, seen, length = 0.0, set(), len(drafters[0].rounds)
    before, deciding, clock = sum(each.deciding for each in drafters), 0.0, time.perf_counter
    while place < length:
        for each in drafters:
            each.place = place
        deciding -= clock()
        nodes = min(*controller.budgets([0]), length - place)
        deciding += clock()
        chosen = drafters[drafter.arm] if isinstance(drafter, Several) else drafter
        proposed = chosen.propose((), nodes)
        deciding -= clock()
        (tree,) = controller.cut([proposed])
        deciding += clock()
        path, on = chosen.path(len(tree)), machine[chosen.name]
        drafting = chosen.seconds(on) if nodes > 1 else 0.0
        verifying = float(on.costs(len(tree)))
        if len(tree) not in seen:
            seen.add(len(tree))
            verifying += FIRST_OF_A_SIZE
        deciding -= clock()
        controller.learn([tree], [path], drafting, verifying)
        deciding += clock()
        steps += drafting + verifying
        place += len(path)
        count += 1
    return Replayed(length, count, steps, deciding + sum(each.deciding for each in drafters) - before)


class _Known:
    """Features that were gathered before."""

    def __init__(self, features: np.ndarray):
        self.values = lambda: features


def played(drafters: Mapping[str, Drafter]) -> PlayedDrafter | Several:
    """What stands for some drafters while their rounds are played."""
    made = [
        PlayedDrafter(name, drafter.fingerprint if hasattr(drafter, "goes_on") else None)
        for name, drafter in drafters.items()
    ]
    for each, drafter in zip(made, drafters.values(), strict=True):
        each.described = described(drafter)
    return Several(made) if len(made) > 1 else made[0]


def best_possible(rounds: Mapping[str, Sequence[RecordedRound]], machines: Mapping[str, Machine]) -> Replayed:
    """The rounds that take least time of all: every round's best size and drafter, which nobody knows beforehand.

    Sizes are recorded already.
    """
    length = len(next(iter(rounds.values())))
    least, counts = [0.0] * (length + 1), [0] * (length + 1)  # from each place of the text on
    for place in reversed(range(length)):
        options = [(1.0, 1)]  # plain steps and tokens
        for name, of_drafter in rounds.items():
            tree, path, laws, _ = of_drafter[place]
            for tokens, node in enumerate(path[1:], start=2):
                levels = 1 + max((int(tree.depths[asked]) for asked in laws if asked <= node), default=-1)
                on = machines[name]
                options.append((on.proposal + on.level * levels + float(on.costs(node + 1)), tokens))
        least[place], tokens = min((steps + least[place + tokens], tokens) for steps, tokens in options)
        counts[place] = 1 + counts[place + tokens]
    return Replayed(length, counts[0], least[0])


def total(replayed: Iterable[Replayed]) -> Replayed:
    """The sums over several texts."""
    return Replayed(*map(sum, zip(*replayed, strict=True)))
