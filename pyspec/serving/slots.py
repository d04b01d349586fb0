"""Slots: the texts that a model writes at a time, which come and go between rounds. One thread's work, no locks."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from pyspec.acceptance import AcceptanceRule
from pyspec.caches import QuantisedSettings
from pyspec.controllers import Controller
from pyspec.drafters import Drafter
from pyspec.loop import run_round
from pyspec.runners import Runner
from pyspec.runners.native import CHUNK
from pyspec.runners.verified import Verified
from pyspec.serving.answer import Text
from pyspec.stats import Stats
from pyspec.tree import DraftTree

FIRST_PIECE, FEWEST_READ = 64, 16  # tokens of a piece: fewer would take hardly less time


class Slots:
    """Texts in the slots of a model; `step` reads a piece of their prompts, then makes a round of those that are read.

    A text is not read before it is its turn, so that it begins with whatever the ones before it have left in the
    prefix cache. A step that fails is tried again text by text, for only then it shows whose fault it is: that text
    ends with the error, and the others go on.

    Args:
        model: a runner with slots, which nobody else uses.
        count: slots.
        capacity: tokens of a text, at most.
        rule, controller: of all texts.
        drafter: what the texts' drafters are started from.
        cache: how keys and values are kept, None for a dense cache.
        prefix_memory: bytes for beginnings of texts, see Runner.keep_prefixes.

    Attributes:
        texts: by slot, in the order in which they came.
        stats: of all rounds.
    """

    def __init__(
        self,
        model: Runner,
        count: int,
        capacity: int,
        rule: AcceptanceRule,
        controller: Controller,
        drafter: Drafter | None,
        cache: QuantisedSettings | None,
        prefix_memory: int,
    ):
        self.texts: dict[int, Text] = {}
        self.stats = Stats(seed=0)
        self._model, self._count, self._rule, self._controller = model, count, rule, controller
        self._drafter = drafter
        self._opened = {"capacity": capacity + controller.largest}
        self._opened |= {"taps": getattr(drafter, "taps", None) or (), "cache": cache}
        self._most = CHUNK if cache is None else min(CHUNK, cache.largest_tree)
        self._shares = prefix_memory > 0 and not self._opened["taps"]
        self._suspects: set[int] = set()  # slots of a step that failed, until each has got on alone
        self._piece = FIRST_PIECE  # tokens that are read while others wait for their round, which takes so long:
        self._round_seconds = math.inf
        model.keep_prefixes(prefix_memory)
        self._open()

    def add(self, text: Text) -> None:
        """Takes a text into a free slot."""
        slot = next(slot for slot in range(self._count) if slot not in self.texts)
        self.texts[slot] = text
        text.since = time.perf_counter()
        with text.trying():
            text.start_drafting()
            self._controller.start(slot, text.drafter)

    def step(self) -> None:
        """A piece of the prompts, and a round of the texts whose prompts are read."""
        going = [slot for slot, text in self.texts.items() if text.going]
        suspect = next((slot for slot in going if slot in self._suspects), None)
        some = going if suspect is None else [suspect]
        self._suspects &= set(going) - {suspect}
        try:
            if not self._model.lengths():
                self._open()
            self._read(some)
            ready = {slot: self.texts[slot] for slot in some if self.texts[slot].going and self._is_read(slot)}
            if ready:
                seconds = self.stats.verify_seconds + self.stats.draft_seconds
                run_round(self._model, ready, self._rule, self._controller, self.stats)
                self._round_seconds = self.stats.verify_seconds + self.stats.draft_seconds - seconds
        except Exception as error:
            if len(some) == 1:
                self.texts[some[0]].fail(error)
            else:
                self._suspects = set(some)

    def leave(self) -> None:
        """Frees the slots of the texts that have ended."""
        for slot in [slot for slot, text in self.texts.items() if not text.going]:
            text = self.texts.pop(slot)
            if text.begun and self._model.lengths():
                self._model.keep(slot, text.context)

    def _open(self) -> None:
        """Opens the model's slots, at first or after they were lost; texts are read from their beginnings then."""
        self._model.open(self._count, **self._opened)
        for text in self.texts.values():
            text.begun = False

    def _is_read(self, slot: int) -> bool:
        """Whether all is committed of a text but its last token, which is the root of its next tree."""
        text = self.texts[slot]
        return text.begun and self._model.lengths()[slot] == len(text.context) - 1

    def _read(self, slots: Sequence[int]) -> None:
        """Reads the next pieces of prompts, in the order in which they came, and of what a failed step left out."""
        others_wait = any(text.going and self._is_read(slot) for slot, text in self.texts.items())
        left, pieces = self._piece if others_wait else CHUNK, {}
        unread = [slot for slot in slots if not self._is_read(slot)]
        for slot in unread:
            if left and not self._waits(slot, unread) and (piece := self._next_piece(slot, left)):
                pieces[slot] = piece
                left -= len(piece)
        if not pieces:
            return
        start = time.perf_counter()
        self._model.read(pieces, None if self._drafter is None else self._observe)
        for slot in pieces:
            self._model.keep(slot, self.texts[slot].context)
        seconds = time.perf_counter() - start
        if others_wait and seconds > self._round_seconds:
            self._piece = max(FEWEST_READ, self._piece // 2)
        elif others_wait and seconds < self._round_seconds / 2:
            self._piece = min(CHUNK, 2 * self._piece)

    def _next_piece(self, slot: int, most: int) -> list[int]:
        text, model = self.texts[slot], self._model
        if not text.begun:
            text.stats.prefix_tokens = model.begin(slot, text.context)
            text.begun = True
        start = model.lengths()[slot]
        if model.piece_end is not None:
            most = min(most, model.piece_end - start % model.piece_end)
        return text.context[start:-1][: min(most, self._most)]

    def _waits(self, slot: int, unread: Sequence[int]) -> bool:
        """Whether a text begins like one that is being read, so that it need not read that too."""
        block, text = self._model.cache.block, self.texts[slot]
        if not self._shares or text.begun or len(text.context) <= block:
            return False
        begun = (self.texts[other] for other in unread if self.texts[other].begun)
        return any(other.context[:block] == text.context[:block] for other in begun)

    def _observe(self, slot: int, chain: DraftTree, verified: Verified) -> None:
        text = self.texts[slot]
        if text.going and text.drafter is not None:
            with text.trying():
                text.drafter.observe(chain, verified, range(len(chain)))
