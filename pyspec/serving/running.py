"""Running: the texts of one request in the engine, for an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial

from pyspec.serving.engine import Engine, QueueFull
from pyspec.serving.refusals import Refused
from pyspec.serving.requests import Ask

#: What generate calls a setting -> the field that it comes from.
_FIELDS = {"tokens": "prompt", "prompt": "prompt", "grammar": "response_format", "max_new_tokens": "max_tokens"}


class Running:
    """The texts of one request. `submit` is for a worker thread, everything else for the event loop's.

    Args:
        engine: what writes them.
        ask: what they are.
        most_seconds: from now until they must be whole.
    """

    def __init__(self, engine: Engine, ask: Ask, most_seconds: float):
        self._engine, self._ask, self._most_seconds = engine, ask, most_seconds
        self._loop = asyncio.get_running_loop()
        self._came: asyncio.Queue = asyncio.Queue()  # (place, piece), and None when the time is over
        self._timer = self._loop.call_later(most_seconds, self._came.put_nowait, None)
        self._answers: list = []
        self.results: list = [None] * len(ask.prompts)

    def submit(self) -> None:
        """Queues all texts; after an error some may be queued, which cancel ends.

        Raises:
            Refused: the queue is full, the engine is closing, or a setting does not fit.
        """
        try:
            for place, (prompt, seed) in enumerate(zip(self._ask.prompts, self._ask.seeds, strict=True)):
                put = partial(self._put, place)
                self._answers.append(self._engine.submit(prompt, seed=seed, on_piece=put, **self._ask.settings))
        except Exception as error:
            raise _refusal(error) from None

    def _put(self, place: int, piece) -> None:
        try:
            self._loop.call_soon_threadsafe(self._came.put_nowait, (place, piece))
        except RuntimeError:  # the event loop is closed, so nobody waits
            pass

    async def pieces(self) -> AsyncIterator[tuple[int, object]]:
        """The pieces of all texts as they come, by their places; None at the end of each, when `results` has it.

        Raises:
            Refused: a text did not come to an end of its own, or not in time.
        """
        left = len(self._answers)
        while left:
            came = await self._came.get()
            if came is None:
                message = f"the answer took longer than the {self._most_seconds:g} seconds that this server allows"
                raise Refused(message, status=504, code="timeout")
            place, piece = came
            if piece is None:
                self.results[place] = result = self._answers[place].result()
                if result.finish_reason == "error":
                    raise Refused(f"the model failed: {result.error}", status=500, code="model_error")
                if result.finish_reason == "cancelled":
                    raise Refused("the answer was broken off: the server is closing", status=503, code="closing")
                left -= 1
            yield place, piece

    def cancel(self) -> None:
        """Ends what is not ended yet."""
        self._timer.cancel()
        for answer in self._answers:
            answer.cancel()


def _refusal(error: Exception) -> Exception:
    """What a client is told of an error of engine.submit."""
    if isinstance(error, QueueFull):
        return Refused(
            "the queue is full: send the request again later",
            status=429,
            code="rate_limit_exceeded",
            kind="rate_limit_error",
            retry_after=error.retry_after,
        )
    if isinstance(error, RuntimeError):
        return Refused("the server is closing", status=503, code="closing")
    if isinstance(error, (ValueError, TypeError, ImportError)):
        name = str(error).split(" ")[0].split("[")[0]
        return Refused(str(error), param=_FIELDS.get(name, name if name.isidentifier() else None))
    return error
