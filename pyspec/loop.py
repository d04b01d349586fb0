"""The loop: propose, verify, accept, commit, observe."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch

from pyspec.acceptance import AcceptanceRule
from pyspec.controllers import Controller
from pyspec.drafters import Drafter
from pyspec.readback import wait_for
from pyspec.runners import Runner
from pyspec.runners.exclusive import exclusive_use
from pyspec.sampling.sampler import InvalidLogits, Sampler
from pyspec.text import TextStream
from pyspec.tree import DraftTree

__all__ = ["Continuation", "Stats", "speculate", "timed"]


@dataclass
class Stats:
    """What a call of generate did, and where the time went.

    A batch counts a round once; its accepted lengths are counted for each sequence that took part.
    """

    seed: int
    new_tokens: int = 0
    rounds: int = 0
    nodes: int = 0  #: tree nodes verified, roots included
    accepted_lengths: list[int] = field(default_factory=list)  #: at k, how often one sequence's round gave k tokens
    prefill_seconds: float = 0.0  #: with the drafter's reading of the prompt
    draft_seconds: float = 0.0  #: propose and observe
    verify_seconds: float = 0.0
    accept_seconds: float = 0.0
    commit_seconds: float = 0.0
    total_seconds: float = 0.0  #: without what it waited for other calls on the model

    @property
    def mean_accepted_length(self) -> float:
        """Tokens that a round gave a sequence; 1 is plain decoding, 0 means that there was no round."""
        tokens = sum(length * count for length, count in enumerate(self.accepted_lengths))
        return tokens / max(1, sum(self.accepted_lengths))

    @property
    def acceptance_by_depth(self) -> list[float]:
        """By depth d, at d - 1, the share of rounds that accepted a draft there. They add up to the mean length - 1."""
        rounds = max(1, sum(self.accepted_lengths))
        return [sum(self.accepted_lengths[length:]) / rounds for length in range(2, len(self.accepted_lengths))]

    @property
    def decode_seconds(self) -> float:
        """All time but the prefill."""
        return self.total_seconds - self.prefill_seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the rounds over the decode time; the tokens that the prefill gave are not counted."""
        tokens = sum(length * count for length, count in enumerate(self.accepted_lengths))
        return tokens / self.decode_seconds if tokens else 0.0

    @property
    def tokens_per_second_with_prefill(self) -> float:
        """All new tokens over all time."""
        return self.new_tokens / self.total_seconds if self.new_tokens else 0.0

    def to_dict(self) -> dict:
        """All figures, the derived ones included, ready for JSON."""
        derived = (
            "mean_accepted_length",
            "acceptance_by_depth",
            "decode_seconds",
            "tokens_per_second",
            "tokens_per_second_with_prefill",
        )
        return asdict(self) | {name: getattr(self, name) for name in derived}


def speculate(
    model: Runner,
    sequences: list[Continuation],
    rule: AcceptanceRule,
    *,
    controller: Controller,
    packed,
    stats: Stats,
) -> None:
    """Continues all sequences to their ends; the model is theirs alone until then.

    Args:
        controller: says how much is drafted and verified.
        packed: how keys and values are kept, None for a dense cache.
        stats: is filled in.

    Raises:
        RuntimeError: this thread is using the model already, or something replaced its batch meanwhile.
    """
    with exclusive_use(model), timed(stats, "total"):  # waiting is no part of it
        _prefill(model, sequences, rule, controller.largest, packed, stats)
        while any(sequence.going for sequence in sequences):
            _round(model, sequences, rule, controller, stats)


def _prefill(model, sequences, rule, largest, packed, stats) -> None:
    """Reads the prompts and draws the first token of each."""

    def observe(index: int, chain: DraftTree, logits: torch.Tensor) -> None:
        sequences[index].drafter.observe(chain, logits, range(len(chain)))

    with timed(stats, "prefill"):
        for sequence in sequences:
            sequence.start_drafting()
        after_prompts = model.prefill(
            [sequence.context for sequence in sequences],
            capacity=max(sequence.limit for sequence in sequences) + largest,
            observe=None if sequences[0].drafter is None else observe,
            **({} if packed is None else {"cache": packed}),  # an argument that only some runners have
        )
    for sequence, logits in zip(sequences, after_prompts, strict=True):
        with timed(stats, "accept"):
            tree = DraftTree.chain(sequence.context[-1:])
            said = sequence.accept(tree, logits[None], rule)
        sequence.emit(said)


def _round(model, sequences, rule, controller, stats) -> None:
    """One round of every sequence that is still going."""
    active = [index for index, sequence in enumerate(sequences) if sequence.going]
    trees: list = [None] * len(sequences)
    paths: list = [None] * len(sequences)
    draft_seconds, verify_seconds = stats.draft_seconds, stats.verify_seconds

    with timed(stats, "draft"):
        proposed = controller.cut([sequences[index].propose(controller.nodes) for index in active])
        for index, tree in zip(active, proposed, strict=True):
            trees[index] = tree
    with timed(stats, "verify"):
        _check_batch(model, sequences)
        logits = model.verify(trees)
        wait_for(logits)  # or the kernels' time would show as acceptance
    draft_seconds, verify_seconds = stats.draft_seconds - draft_seconds, stats.verify_seconds - verify_seconds
    stats.rounds += 1
    for index in active:
        sequence = sequences[index]
        with timed(stats, "accept"):
            said = sequence.accept(trees[index], logits[index], rule)
        kept = sequence.emit(said)
        paths[index] = said.path
        stats.nodes += len(trees[index])
        stats.accepted_lengths += [0] * (kept + 1 - len(stats.accepted_lengths))
        stats.accepted_lengths[kept] += 1
    controller.learn(proposed, [paths[index] for index in active], draft_seconds, verify_seconds)
    with timed(stats, "commit"):
        model.commit([path if sequence.going else None for sequence, path in zip(sequences, paths, strict=True)])
    with timed(stats, "draft"):
        for index in active:
            sequence = sequences[index]
            if sequence.drafter is not None and sequence.error is None:
                sequence.drafter.observe(trees[index], logits[index], paths[index])


def _check_batch(model, sequences) -> None:
    """Raises RuntimeError if the model has another batch than these sequences."""
    lengths = model.lengths()
    for index, sequence in enumerate(sequences):
        if sequence.going and lengths[index : index + 1] != [len(sequence.context) - 1]:
            raise RuntimeError(
                f"model must keep its batch while it generates: sequence {index} has {len(sequence.context) - 1} "
                f"committed tokens, the model's lengths are {lengths}. A callback that needs the model can use "
                "model.fork(), a runner on the same weights"
            )


class _Said(NamedTuple):
    """One round of one sequence."""

    tokens: list[int]
    path: list[int]  # accepted nodes, root included
    error: str | None = None


@dataclass
class Continuation:
    """One prompt and what became of it."""

    model: Runner
    context: list[int]  # prompt and new tokens; the last one's key is not cached yet
    prompt_length: int
    limit: int  # tokens of the context at which it ends
    drafter: Drafter | None  # shared by all sequences until start_drafting
    sampler: Sampler
    text: TextStream | None
    stream: Callable[[str], None] | None
    finish_reason: str | None = None
    error: str | None = None

    @property
    def going(self) -> bool:
        return self.finish_reason is None

    @property
    def new_tokens(self) -> list[int]:
        return self.context[self.prompt_length :]

    def start_drafting(self) -> None:
        if self.drafter is not None:
            self.drafter = self.drafter.start(self.context)

    def propose(self, budget: int) -> DraftTree:
        # a tree of as many nodes as tokens are left is never too deep for the limit or the context
        budget = min(budget, self.limit - len(self.context))
        if self.drafter is None or budget == 1:
            return DraftTree.chain(self.context[-1:])
        tree = self.drafter.propose(self.context, budget)
        tokens = tree.tokens.tolist()
        if len(tokens) > budget or tokens[0] != self.context[-1]:
            raise ValueError(
                f"drafter must propose at most {budget} nodes below token {self.context[-1]}, "
                f"got {len(tokens)} below token {tokens[0]}"
            )
        if min(tokens) < 0 or max(tokens) >= self.model.vocab_size:
            raise ValueError(f"drafter proposed tokens outside of [0, {self.model.vocab_size}): {tokens}")
        return tree

    def accept(self, tree: DraftTree, logits: torch.Tensor, rule: AcceptanceRule) -> _Said:
        tokens = tree.tokens.tolist()
        try:
            path, next_token = rule.accept(tree, logits, self.sampler, len(self.context))
        except InvalidLogits as invalid:
            # the drafts up to that node were accepted, as plain decoding would have said them before it failed
            return _Said([tokens[node] for node in invalid.path[1:]], invalid.path, self._describe(invalid, tree))
        return _Said([*(tokens[node] for node in path[1:]), next_token], path)

    def emit(self, said: _Said) -> int:
        """Adds tokens up to the one that ends the text, and streams; returns how many were added."""
        before = len(self.context)
        for token in said.tokens:
            self.context.append(token)
            if token in self.model.eos_tokens:
                self.finish("eos")
            elif self.text is not None:
                self.text.push(token)
                if self.text.stopped:
                    self.finish("stop")
            if self.going and len(self.context) >= self.limit:
                self.finish("length")
            if not self.going:
                break
        if self.going and said.error is not None:
            self.error = said.error
            self.finish("error")
        if self.going:
            self._show()
        return len(self.context) - before

    def finish(self, reason: str) -> None:
        self.finish_reason = reason
        if self.text is not None:
            self.text.finish()
            self._show()

    def _show(self) -> None:
        if self.stream is not None and (piece := self.text.take()):
            self.stream(piece)

    def _describe(self, invalid: InvalidLogits, tree: DraftTree) -> str:
        node = invalid.path[-1]
        token, depth = int(tree.tokens[node]), int(tree.depths[node])
        spelled = "" if self.model.tokenizer is None else f" {self.model.tokenizer.token_bytes(token)!r}"
        return (
            f"the logits of node {node} (depth {depth}, position {len(self.context) - 1 + depth}, "
            f"token {token}{spelled}) are {invalid}"
        )


class timed:
    """A context whose time is added to a phase of stats."""

    __slots__ = ("_stats", "_name", "_start")

    def __init__(self, stats: Stats, phase: str):
        self._stats, self._name = stats, f"{phase}_seconds"

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *error) -> None:
        seconds = time.perf_counter() - self._start
        setattr(self._stats, self._name, getattr(self._stats, self._name) + seconds)
