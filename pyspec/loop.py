"""The loop: propose, verify, accept, commit, observe."""

from __future__ import annotations

from pyspec.acceptance import AcceptanceRule
from pyspec.controllers import Controller
from pyspec.runners import Runner
from pyspec.runners.exclusive import exclusive_use
from pyspec.runners.verified import Verified
from pyspec.sequence import Sequence, propose
from pyspec.stats import Stats
from pyspec.tree import DraftTree


def speculate(
    model: Runner,
    sequences: list[Sequence],
    rule: AcceptanceRule,
    *,
    controller: Controller,
    cache,
    prefix_memory: int = 0,
    stats: Stats,
) -> None:
    """Continues all sequences to their ends; the model is theirs alone until then.

    Args:
        controller: says how much is drafted and verified.
        cache: how keys and values are kept, None for a dense cache.
        prefix_memory: bytes of texts' beginnings that the model keeps for later calls; above 0 only where it can.
        stats: is filled in.

    Raises:
        RuntimeError: this thread is using the model already, or something replaced its batch meanwhile.
    """
    with exclusive_use(model), stats.timed("total"):  # waiting is no part of it
        if keeps := hasattr(model, "keep_prefixes"):
            model.keep_prefixes(prefix_memory)
            spared = model.prefixes.spared
        prefill(model, sequences, rule, controller, cache, stats)
        while going := {slot: sequence for slot, sequence in enumerate(sequences) if sequence.going}:
            run_round(model, going, rule, controller, stats)
        if keeps:
            stats.prefix_tokens = model.prefixes.spared - spared
            for slot, sequence in enumerate(sequences):
                model.keep(slot, sequence.context)


def prefill(model, sequences: list[Sequence], rule, controller, cache, stats) -> None:
    """Reads the prompts, the first into slot 0, and draws the first token of each."""

    def observe(slot: int, chain: DraftTree, verified: Verified) -> None:
        sequences[slot].drafter.observe(chain, verified, range(len(chain)))

    with stats.timed("prefill"):
        for slot, sequence in enumerate(sequences):
            sequence.start_drafting()
            controller.start(slot, sequence.drafter)
        asked = {"cache": cache, "taps": getattr(sequences[0].drafter, "taps", None)}  # which only some runners take
        after_prompts = model.prefill(
            [sequence.context for sequence in sequences],
            capacity=max(sequence.limit for sequence in sequences) + controller.largest,
            observe=None if sequences[0].drafter is None else observe,
            **{name: value for name, value in asked.items() if value is not None},
        )
    for sequence, logits in zip(sequences, after_prompts, strict=True):
        last = DraftTree.chain(sequence.context[-1:])
        with stats.timed("accept"):
            accepted = sequence.accept(last, Verified(logits[None]), rule)
        sequence.extend(last, accepted)


def run_round(model, going: dict[int, Sequence], rule, controller, stats) -> None:
    """One round of the sequences that are still going, by slot."""
    draft_seconds, verify_seconds = stats.draft_seconds, stats.verify_seconds

    with stats.timed("draft"):
        budgets = controller.budgets(list(going))
        room = getattr(model, "room", None)  # which few have
        if room is not None:
            budgets = [min(nodes, room(slot)) for slot, nodes in zip(going, budgets, strict=True)]
        proposed = propose(list(going.values()), budgets)
        trees = dict(zip(going, controller.cut(proposed), strict=True))

    with stats.timed("verify"):
        _check_batch(model, going)
        verified = model.verify(trees)
        next(iter(verified.values())).wait()  # or the kernels' time would show as acceptance

    draft_seconds, verify_seconds = stats.draft_seconds - draft_seconds, stats.verify_seconds - verify_seconds
    stats.rounds += 1
    paths = {}
    for slot, sequence in going.items():
        paths[slot] = [0]
        if not sequence.going:  # its drafter failed
            continue
        with sequence.trying():
            with stats.timed("accept"):
                accepted = sequence.accept(trees[slot], verified[slot], rule)
            paths[slot] = accepted.path
            stats.count(len(trees[slot]), sequence.extend(trees[slot], accepted))
    controller.learn(list(trees.values()), list(paths.values()), draft_seconds, verify_seconds)

    with stats.timed("commit"):
        model.commit({slot: paths[slot] for slot, sequence in going.items() if sequence.going})
        if getattr(model, "piece_end", None) is not None:  # blocks pass: what is kept of them is taken now
            for slot, sequence in going.items():
                model.keep(slot, sequence.context)

    with stats.timed("draft"):
        for slot, sequence in going.items():
            if sequence.drafter is not None and sequence.error is None:
                with sequence.trying():
                    sequence.drafter.observe(trees[slot], verified[slot], paths[slot])


def _check_batch(model, going: dict[int, Sequence]) -> None:
    """Raises RuntimeError if the model has another batch than these sequences."""
    lengths = model.lengths()
    for slot, sequence in going.items():
        if lengths[slot : slot + 1] != [len(sequence.context) - 1]:
            raise RuntimeError(
                f"model must keep its batch while it generates: sequence {slot} has {len(sequence.context) - 1} "
                f"committed tokens, the model's lengths are {lengths}. A callback that needs the model can use "
                "model.fork(), a runner on the same weights"
            )
