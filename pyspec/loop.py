"""The loop: propose, verify, accept, commit, observe."""

from __future__ import annotations

import torch

from pyspec.acceptance import AcceptanceRule
from pyspec.controllers import Controller
from pyspec.readback import wait_for
from pyspec.runners import Runner
from pyspec.runners.exclusive import exclusive_use
from pyspec.sequence import Sequence
from pyspec.stats import Stats
from pyspec.tree import DraftTree

__all__ = ["speculate"]


def speculate(
    model: Runner,
    sequences: list[Sequence],
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
    with exclusive_use(model), stats.timed("total"):  # waiting is no part of it
        _prefill(model, sequences, rule, controller.largest, packed, stats)
        while any(sequence.going for sequence in sequences):
            _round(model, sequences, rule, controller, stats)


def _prefill(model, sequences, rule, largest, packed, stats) -> None:
    """Reads the prompts and draws the first token of each."""

    def observe(index: int, chain: DraftTree, logits: torch.Tensor) -> None:
        sequences[index].drafter.observe(chain, logits, range(len(chain)))

    with stats.timed("prefill"):
        for sequence in sequences:
            sequence.start_drafting()
        after_prompts = model.prefill(
            [sequence.context for sequence in sequences],
            capacity=max(sequence.limit for sequence in sequences) + largest,
            observe=None if sequences[0].drafter is None else observe,
            **({} if packed is None else {"cache": packed}),  # an argument that only some runners have
        )
    for sequence, logits in zip(sequences, after_prompts, strict=True):
        last = DraftTree.chain(sequence.context[-1:])
        with stats.timed("accept"):
            accepted = sequence.accept(last, logits[None], rule)
        sequence.extend(last, accepted)


def _round(model, sequences, rule, controller, stats) -> None:
    """One round of every sequence that is still going."""
    active = [index for index, sequence in enumerate(sequences) if sequence.going]
    trees: list = [None] * len(sequences)
    paths: list = [None] * len(sequences)
    draft_seconds, verify_seconds = stats.draft_seconds, stats.verify_seconds

    with stats.timed("draft"):
        proposed = controller.cut([sequences[index].propose(controller.nodes) for index in active])
        for index, tree in zip(active, proposed, strict=True):
            trees[index] = tree
    with stats.timed("verify"):
        _check_batch(model, sequences)
        logits = model.verify(trees)
        wait_for(logits)  # or the kernels' time would show as acceptance
    draft_seconds, verify_seconds = stats.draft_seconds - draft_seconds, stats.verify_seconds - verify_seconds
    stats.rounds += 1
    for index in active:
        sequence = sequences[index]
        with stats.timed("accept"):
            accepted = sequence.accept(trees[index], logits[index], rule)
        paths[index] = accepted.path
        stats.count(len(trees[index]), sequence.extend(trees[index], accepted))
    controller.learn(proposed, [paths[index] for index in active], draft_seconds, verify_seconds)
    with stats.timed("commit"):
        model.commit([path if sequence.going else None for sequence, path in zip(sequences, paths, strict=True)])
    with stats.timed("draft"):
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
