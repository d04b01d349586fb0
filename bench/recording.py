"""generate, with the logits that every token was drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pyspec.acceptance.exact import ExactAcceptance
from pyspec.generate import Stats, generate


@dataclass
class Text:
    """One sequence's new tokens, and for each of them the [V] logits that it was drawn from."""

    tokens: list[int]
    logits: list[torch.Tensor]


def record(model, prompts: Sequence[Sequence[int]], **settings) -> tuple[list[Text], Stats]:
    """A batch generated with exact acceptance and generate's other settings.

    Raises:
        KeyboardInterrupt: generation was interrupted.
        RuntimeError: generation failed.
    """
    recorder = _Recorder(model)
    generation = generate(recorder, prompts, acceptance=recorder, **settings)
    if "interrupted" in generation.finish_reason:
        raise KeyboardInterrupt
    for error in generation.error:
        if error is not None:
            raise RuntimeError(error)
    # a round may draw more than the limit or the end token leaves room for
    texts = [
        Text(tokens, logits[: len(tokens)])
        for tokens, logits in zip(generation.tokens, recorder.drawn_from, strict=True)
    ]
    return texts, generation.stats


class _Recorder:
    """A runner and its acceptance rule in one, because only the runner knows which sequence logits belong to."""

    law = "exact"
    siblings = None

    def __init__(self, model):
        self._model = model
        self._exact = ExactAcceptance()
        self.drawn_from: list[list[torch.Tensor]] = []

    def __getattr__(self, name: str):
        return getattr(self._model, name)

    def prefill(self, tokens, **options):
        self.drawn_from = [[] for _ in tokens]
        logits = self._model.prefill(tokens, **options)
        self._remember(enumerate(logits))
        return logits

    def verify(self, trees):
        verified = self._model.verify(trees)
        self._remember((slot, rows.logits) for slot, rows in verified.items())
        return verified

    def _remember(self, logits):
        self._slots = {rows.data_ptr(): slot for slot, rows in logits}

    def accept(self, tree, verified, sampler, position):
        accepted = self._exact.accept(tree, verified, sampler, position)
        logits = verified.logits
        self.drawn_from[self._slots[logits.data_ptr()]] += logits[accepted.path].cpu().unbind()
        return accepted
