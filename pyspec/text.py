"""TextStream: the text of one sequence, as its tokens come."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

__all__ = ["TextStream"]


class TextStream:
    """Turns tokens into text: only whole characters, cut before the first stop string.

    A stop string may begin inside a token and span several. `take` never gives out text that a later token
    may turn into a stop string, so what was shown is always a beginning of the final text.

    Args:
        tokenizer: has `token_bytes(token) -> bytes`.
        stop: strings, none empty.
    """

    def __init__(self, tokenizer, stop: Sequence[str] = ()):
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._longest_stop = max(map(len, self._stop), default=0)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._taken = 0

    def push(self, token: int) -> None:
        """Adds a token; sets `stopped` and cuts the text if it completes a stop string."""
        self._extend(self._decoder.decode(self._tokenizer.token_bytes(token)))

    def finish(self) -> None:
        """No more tokens: an unfinished character becomes U+FFFD, and nothing is held back any longer."""
        if not self.stopped:
            self._extend(self._decoder.decode(b"", final=True))
        self._longest_stop = 0

    def take(self) -> str:
        """The text that is certain by now and was not taken before."""
        certain = len(self.text) - self._held_back()
        piece = self.text[self._taken : certain]
        self._taken = certain
        return piece

    def _extend(self, piece: str) -> None:
        first_new = max(0, len(self.text) - self._longest_stop + 1)
        self.text += piece
        starts = [start for stop in self._stop if (start := self.text.find(stop, first_new)) >= 0]
        if starts:
            self.text = self.text[: min(starts)]
            self.stopped = True

    def _held_back(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        if self.stopped:
            return 0
        for length in range(min(len(self.text), self._longest_stop - 1), 0, -1):
            if any(stop.startswith(self.text[-length:]) for stop in self._stop):
                return length
        return 0
