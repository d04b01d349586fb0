"""Answer: what becomes of one request to an engine, piece by piece, for the thread that asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import NamedTuple

from pyspec.generate import Generation, generation_of
from pyspec.sampling.logprobs import TokenLogprobs
from pyspec.sequence import Sequence
from pyspec.stats import Stats
from pyspec.tree import Accepted, DraftTree


class Piece(NamedTuple):
    """What one round gave a text. The pieces of an answer make up its text, tokens and logprobs.

    Attributes:
        text: what became certain; "" while a stop string may still come of it, or without a tokenizer.
        tokens: the new ones; none in a last piece that shows what was held back.
        logprobs: of these tokens where they were asked for, else None.
    """

    text: str
    tokens: list[int]
    logprobs: list[TokenLogprobs] | None


@dataclass(kw_only=True)
class Text(Sequence):
    """A sequence in an engine's slot, whose errors are its own.

    Attributes:
        stats: of this text; prefill_seconds and total_seconds count from when it came into its slot.
        begun: whether its slot knows it, so that its prompt is being read or was.
        since: when it came into its slot, by time.perf_counter.
    """

    stats: Stats
    keeps_errors: bool = True
    begun: bool = False
    since: float = 0.0
    _given: int = field(default=0, repr=False)  # new tokens that were in a piece

    def extend(self, tree: DraftTree, accepted: Accepted) -> int:
        if not self.stats.rounds:
            self.stats.prefill_seconds = time.perf_counter() - self.since
        count = super().extend(tree, accepted)
        self.stats.rounds += 1
        self.stats.count(len(tree), count)
        return count

    def take_piece(self) -> Piece | None:
        """What is new since the last piece; None if nothing is."""
        tokens, first = self.context[self.prompt_length + self._given :], self._given
        text = "" if self.text is None else self.text.take()
        if not (tokens or text):
            return None
        self._given += len(tokens)
        return Piece(text, tokens, None if self.top_logprobs is None else self.logprobs[first : self._given])


class Answer:
    """A request's answer, from Engine.submit. Iterating gives its pieces as they are made, in the caller's thread.

    An error does not raise but ends the pieces: `result` tells of it.

    Attributes:
        prompt_tokens: the prompt's token ids.
    """

    def __init__(self, text: Text, on_piece: Callable[[Piece | None], None] | None, cancel: Callable[[Answer], None]):
        self.prompt_tokens = list(text.context)
        self._text, self._on_piece, self._cancel = text, on_piece, cancel
        self._pieces: SimpleQueue[Piece | None] = SimpleQueue()
        self._ended = threading.Event()
        self._result: Generation | None = None
        self._is_cancelled = False

    def __iter__(self) -> Iterator[Piece]:
        while (piece := self._pieces.get()) is not None:
            yield piece
        self._pieces.put(None)  # for whoever iterates again

    @property
    def done(self) -> bool:
        """Whether there is a result."""
        return self._ended.is_set()

    def cancel(self) -> None:
        """Ends the text as it is, with finish_reason "cancelled", before the next round; from any thread, at any time.

        An answer that is done stays as it is.
        """
        self._is_cancelled = True
        self._cancel(self)

    def result(self, timeout: float | None = None) -> Generation:
        """Waits for the end of the text; returns what pyspec.generate would, with "cancelled" for a cancelled one.

        Args:
            timeout: seconds to wait at most; None waits as long as it takes.

        Raises:
            TimeoutError: the text goes on still.
        """
        if not self._ended.wait(timeout):
            raise TimeoutError(f"the answer is not done after {timeout} seconds")
        return self._result

    # ==== for the engine ====

    def _give(self) -> None:
        """Gives what is new of the text; what on_piece raises ends it."""
        piece = self._text.take_piece()
        if piece is None:
            return
        if self._on_piece is None:
            self._pieces.put(piece)
            return
        with self._text.trying():
            self._on_piece(piece)

    def _end(self) -> None:
        """Gives the rest of a finished text, and its result."""
        text, stats = self._text, self._text.stats
        self._give()
        stats.new_tokens = len(text.new_tokens)
        stats.total_seconds = time.perf_counter() - text.since if text.since else 0.0
        self._result = generation_of([text], stats, batched=False)
        text.drafter = None  # which may hold a slot of its own
        self._ended.set()
        self._pieces.put(None)
        if self._on_piece is not None:
            with text.trying():
                self._on_piece(None)


class QueueFull(RuntimeError):
    """As many requests wait as may.

    Attributes:
        retry_after: seconds until one of them is likely to have come into a slot.
    """

    def __init__(self, waiting: int, retry_after: float):
        super().__init__(f"queue is full: {waiting} requests wait already, try again in {retry_after:.0f} seconds")
        self.retry_after = retry_after
