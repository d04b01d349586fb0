"""beam_search: the likeliest texts, in groups that differ from each other, over one tree of keys and values."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from pyspec.arguments import read_integer, read_number
from pyspec.branches import Branches, trunk_of
from pyspec.generate import check_limits
from pyspec.ops.topk import topk
from pyspec.runners import Runner
from pyspec.runners.exclusive import exclusive_use
from pyspec.runners.verified import Verified
from pyspec.sequence import TextStream
from pyspec.stats import Stats, clock_of

MOST_BEAMS = 256


@dataclass
class Beam:
    """One text that a beam search found.

    Attributes:
        tokens: new tokens, the end token included.
        text: of these tokens, without the end token; None where the model has no tokenizer.
        score: the sum of log probabilities, less penalties for what other groups said, over length ** length_penalty.
        group: the number of its group, in [0, groups).
        finish_reason: "eos" or "length".
    """

    tokens: list[int]
    text: str | None
    score: float
    group: int
    finish_reason: str


@dataclass
class Beams:
    """What beam_search gives back.

    Attributes:
        beams: the best first; of equals the lower group.
        stats: rounds, nodes and times; a round is one new token of every beam.
    """

    beams: list[Beam]
    stats: Stats


def beam_search(
    model: Runner,
    tokens,
    *,
    beams: int = 8,
    groups: int = 1,
    diversity: float = 0.5,
    length_penalty: float = 1.0,
    max_new_tokens: int = 64,
) -> Beams:
    """The likeliest continuations of a prompt, by beam search in groups.

    Diverse beam search (Vijayakumar et al., arXiv 1610.02424), in the form that transformers gave it: in each step a
    group's scores lose `diversity` for every time that a group before it has chosen the token in this step. One group
    is plain beam search. The beams share the keys of what they begin with, as nodes of one tree.

    Args:
        model: a runner, from pyspec.load.
        tokens: the token ids of one prompt, at least two of them.
        beams: texts that are kept, in [1, 256].
        groups: that the beams are divided into; a divisor of their number.
        diversity: at least 0; nats that a token loses for each time that it was chosen before.
        length_penalty: the score is the sum over length ** length_penalty: above 0 helps long texts.
        max_new_tokens: new tokens of each beam; the model's context ends it too.

    Raises:
        ValueError, TypeError: naming the argument that does not fit, before any work.
    """
    prompt = trunk_of(tokens, model)
    beams, groups, diversity, length_penalty, max_new_tokens = check_beams(
        beams, groups, diversity, length_penalty, max_new_tokens
    )
    search = _Search(model, beams, groups, diversity, length_penalty)
    stats = Stats(seed=0)
    stats.clock = clock_of(model)
    with exclusive_use(model), stats.timed("total"):
        search.run(prompt, min(max_new_tokens, model.context_length - len(prompt)), stats)
    found = sorted((beam for group in search.groups for beam in group.finished), key=lambda beam: -beam.score)
    stats.new_tokens = sum(len(beam.tokens) for beam in found)
    return Beams(found, stats)


def check_beams(
    beams: int, groups: int, diversity: float, length_penalty: float, max_new_tokens: int
) -> tuple[int, int, float, float, int]:
    """Checks what beam_search takes beside a prompt; raises TypeError or ValueError for anything else."""
    _, max_new_tokens = check_limits("auto", max_new_tokens)
    beams, groups = read_integer("beams", beams), read_integer("groups", groups)
    diversity, length_penalty = read_number("diversity", diversity), read_number("length_penalty", length_penalty)
    if not 1 <= beams <= MOST_BEAMS:
        raise ValueError(f"beams must be in [1, {MOST_BEAMS}], got {beams}")
    if not 1 <= groups <= beams or beams % groups:
        raise ValueError(f"groups must divide the number of beams, {beams}, got {groups}")
    if not 0 <= diversity < math.inf:
        raise ValueError(f"diversity must be finite and at least 0, got {diversity}")
    if not math.isfinite(length_penalty):
        raise ValueError(f"length_penalty must be finite, got {length_penalty}")
    return beams, groups, diversity, length_penalty, max_new_tokens


class _Living(NamedTuple):
    """A beam that goes on: the node of its last token, the sum of its scores, and its new tokens."""

    node: int
    total: float
    tokens: tuple[int, ...]


@dataclass
class _Group:
    """The beams of a group. Those that have ended are kept while no better ones push them out."""

    size: int
    living: list[_Living]
    finished: list[Beam] = field(default_factory=list)

    def finish(self, beam: Beam) -> None:
        self.finished.append(beam)
        if len(self.finished) > self.size:
            self.finished.remove(min(self.finished, key=lambda each: each.score))

    def is_done(self, attainable: float) -> bool:
        """Whether a living beam of this score could push none of the finished ones out."""
        return len(self.finished) == self.size and min(each.score for each in self.finished) >= attainable


class _Search:
    def __init__(self, model: Runner, beams: int, groups: int, diversity: float, length_penalty: float):
        self._model, self._beams = model, beams
        self._diversity, self._length_penalty = diversity, length_penalty
        self.groups = [_Group(beams // groups, [_Living(0, 0.0, ())]) for _ in range(groups)]
        # enough that the others still fill a group where every end token is among the best
        self._candidates = beams // groups * max(2, 1 + len(model.eos_tokens))

    def run(self, prompt: Sequence[int], length: int, stats: Stats) -> None:
        """Searches texts of at most so many new tokens."""
        with stats.timed("prefill"):
            branches = Branches.after(self._model, prompt, self._beams * (length + 1))
        places = {0: 0}
        for step in range(1, length + 1):
            with stats.timed("verify"):
                verified = branches.rows()
                verified.wait()
            stats.rounds, stats.nodes = stats.rounds + 1, stats.nodes + len(verified.logits)
            with stats.timed("accept"):
                self._step(verified, places, branches, step)
            going = [group for group in self.groups if group.living]
            if not going or step == length:
                break
            with stats.timed("commit"):
                places = self._prune(branches, going)
        for number, group in enumerate(self.groups):
            for beam in group.living:
                group.finish(self._beam(beam.tokens, beam.total, number, "length"))

    def _step(self, verified: Verified, places: dict[int, int], branches: Branches, step: int) -> None:
        """One more token for every beam. places: the row of each living beam's node."""
        vocab_size = verified.logits.shape[1]
        # a group may lose all that those before it have chosen
        count = min(vocab_size, self._candidates + self._beams)
        best = topk(verified.logits.float(), count, sorted=True)
        best_tokens = best.indices.cpu().numpy()
        logprobs = best.values.double().cpu().numpy() - verified.statistics.log_sum_exp[:, None].astype(np.float64)
        chosen: Counter[int] = Counter()
        for number, group in enumerate(self.groups):
            if not group.living:
                continue
            candidates = []
            for index, beam in enumerate(group.living):
                row = places[beam.node]
                for token, logprob in zip(best_tokens[row].tolist(), logprobs[row].tolist(), strict=True):
                    score = beam.total + logprob - self._diversity * chosen[token]
                    candidates.append((-score, index * vocab_size + token))
            candidates.sort()
            self._choose(group, number, candidates[: self._candidates], vocab_size, branches, step)
            chosen.update(beam.tokens[-1] for beam in group.living)

    def _choose(self, group: _Group, number: int, candidates, vocab_size: int, branches: Branches, step: int) -> None:
        """The best candidates become a group's beams, or end."""
        parents, ends = group.living, self._model.eos_tokens
        picked: list[tuple[int, int, float]] = []
        for rank, (negative, place) in enumerate(candidates):
            parent, token = divmod(place, vocab_size)
            if token in ends:
                if rank < group.size:  # else others of its score would go on
                    group.finish(self._beam((*parents[parent].tokens, token), -negative, number, "eos"))
            elif -negative > -math.inf:
                picked.append((parent, token, -negative))
            if len(picked) == group.size:
                break
        if not picked or group.is_done(picked[0][2] / step**self._length_penalty):
            group.living = []
            return
        nodes = branches.add([parents[parent].node for parent, _, _ in picked], [token for _, token, _ in picked])
        group.living = [
            _Living(node, total, (*parents[parent].tokens, token))
            for node, (parent, token, total) in zip(nodes, picked, strict=True)
        ]

    def _prune(self, branches: Branches, going: Sequence[_Group]) -> dict[int, int]:
        """Lets go of dead nodes; gives the rows that the living beams' nodes will have."""
        leaves = branches.prune([beam.node for group in going for beam in group.living])
        numbers = iter(leaves)
        for group in going:
            group.living = [beam._replace(node=next(numbers)) for beam in group.living]
        return {node: row for row, node in enumerate(leaves)}

    def _beam(self, tokens: tuple[int, ...], total: float, group: int, reason: str) -> Beam:
        text = None
        if self._model.tokenizer is not None:
            stream = TextStream(self._model.tokenizer)
            for token in tokens[:-1] if reason == "eos" else tokens:
                stream.push(token)
            stream.finish()
            text = stream.text
        return Beam(list(tokens), text, total / len(tokens) ** self._length_penalty, group, reason)
