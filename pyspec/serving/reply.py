"""Reply: the response to a request that is in the engine, whole or as server-sent events."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import anyio
from starlette.responses import Response

from pyspec.serving.forms import Form, event
from pyspec.serving.metrics import Metrics
from pyspec.serving.refusals import Refused
from pyspec.serving.running import Running


class Reply:
    """Waits for the texts of a request and sends them; ends them if the client goes away.

    Args:
        running: the texts.
        form: how they are told.
        stream: whether they are sent piece by piece.
        metrics: hears of each piece.
    """

    def __init__(self, running: Running, form: Form, stream: bool, metrics: Metrics):
        self._running, self._form, self._stream, self._metrics = running, form, stream, metrics
        self._begin = time.perf_counter()

    async def __call__(self, scope, receive, send) -> None:
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_until_gone, receive, tasks.cancel_scope)
                await (self._send_events(send) if self._stream else self._send_whole(scope, receive, send))
                tasks.cancel_scope.cancel()
        finally:
            self._running.cancel()

    async def _send_whole(self, scope, receive, send) -> None:
        try:
            async for _ in self._pieces():
                pass
            body, status = self._form.whole(self._running.results), 200
        except Refused as refused:
            body, status = refused.to_dict(), refused.status
        await Response(json.dumps(body, ensure_ascii=False), status, media_type="application/json")(
            scope, receive, send
        )

    async def _send_events(self, send: Callable[[dict], Awaitable]) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        headers.append((b"x-accel-buffering", b"no"))  # nginx would wait for more
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def tell(chunk: dict | str | None) -> None:
            if chunk is not None:
                await send({"type": "http.response.body", "body": event(chunk), "more_body": True})

        try:
            for place in range(len(self._running.results)):
                await tell(self._form.first(place))
            async for place, piece in self._pieces():
                if piece is not None:
                    await tell(self._form.piece(place, piece))
                else:
                    await tell(self._form.last(place, self._running.results[place]))
            await tell(self._form.end(self._running.results))
            await tell("[DONE]")
        except Refused as refused:  # the status is sent already
            await tell(refused.to_dict())
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pieces(self) -> AsyncIterator[tuple[int, object]]:
        """The pieces, timed."""
        last, seen = [self._begin] * len(self._running.results), set()
        async for place, piece in self._running.pieces():
            if piece is not None and piece.tokens:
                now = time.perf_counter()
                (self._metrics.next_piece if place in seen else self._metrics.first_piece).observe(now - last[place])
                last[place] = now
                seen.add(place)
            yield place, piece


async def _until_gone(receive: Callable[[], Awaitable[dict]], scope: anyio.CancelScope) -> None:
    """Cancels a scope when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()
