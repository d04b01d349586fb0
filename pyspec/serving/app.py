"""The server's application: OpenAI's interface in front of an engine."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
import traceback
from collections.abc import Callable
from functools import partial

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pyspec.serving.engine import Engine
from pyspec.serving.fields import parse_body
from pyspec.serving.forms import ChatForm, Form, TextForm
from pyspec.serving.metrics import Metrics
from pyspec.serving.refusals import Refused
from pyspec.serving.reply import Reply
from pyspec.serving.requests import Ask, read_chat, read_completion
from pyspec.serving.running import Running

MOST_BYTES = 2**22
MOST_SECONDS = 600.0
_BODY_SECONDS = 30.0  # in which a body must have come

log = logging.getLogger("pyspec.serving")


class Application:
    """The ASGI application of a server: chats, completions, models, health and metrics.

    Each response is counted and logged, without a word of prompt or text.

    Args:
        engine: what writes the texts; whoever made it closes it.
        name: of the model, which requests must ask for.
        api_key: what the header `Authorization: Bearer` must hold for all but /health; None asks for none.
        most_bytes: of a request's body.
        most_seconds: that an answer may take, the time in the queue included.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        *,
        api_key: str | None = None,
        most_bytes: int = MOST_BYTES,
        most_seconds: float = MOST_SECONDS,
    ):
        self._engine, self._name, self._api_key = engine, name, api_key
        self._most_bytes, self._most_seconds = most_bytes, most_seconds
        self._started = int(time.time())
        self._metrics = Metrics(engine)
        routes = [
            Route("/v1/chat/completions", partial(self._answer, read_chat, ChatForm), methods=["POST"]),
            Route("/v1/completions", partial(self._answer, read_completion, TextForm), methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/health", self._health),
            Route("/metrics", self._figures),
        ]
        handlers = {Refused: _refused, HTTPException: _http_error, ClientDisconnect: _gone}
        self._routes = Starlette(routes=routes, exception_handlers=handlers)
        self._paths = {route.path for route in routes}

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self._routes(scope, receive, send)
        begin, status = time.perf_counter(), 0

        async def counting_send(message: dict) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            if (refused := self._unauthorised(scope)) is not None:
                await _refused(None, refused)(scope, receive, counting_send)
            else:
                await self._routes(scope, receive, counting_send)
        except Exception as error:
            _log_failure(error)
            if not status:
                refused = Refused("the server failed, which is an error of its own", status=500)
                await _refused(None, refused)(scope, receive, counting_send)
        finally:
            seconds = time.perf_counter() - begin
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.count(path, status, seconds)
            log.info("%s %s %d %.3f s", scope["method"], path, status, seconds)

    def _unauthorised(self, scope) -> Refused | None:
        if self._api_key is None or scope["path"] == "/health":
            return None
        sent = dict(scope["headers"]).get(b"authorization", b"")
        if hmac.compare_digest(sent, b"Bearer " + self._api_key.encode()):
            return None
        what = "Incorrect API key provided" if sent else "You didn't provide an API key"
        return Refused(f"{what}: send it as 'Authorization: Bearer KEY'", status=401, code="invalid_api_key")

    async def _answer(self, read: Callable[..., Ask], form: type[Form], request: Request) -> Response:
        body = await self._body(request)
        ask = await run_in_threadpool(lambda: read(parse_body(body), self._engine, self._name))
        running = Running(self._engine, ask, self._most_seconds)
        try:
            await run_in_threadpool(running.submit)
        except BaseException:  # the client may go away meanwhile
            running.cancel()
            raise
        told = form(ask, self._engine.model, self._name)
        return Reply(running, told, ask.stream, self._metrics)

    async def _body(self, request: Request) -> bytes:
        """The body of a request, which must be JSON by its header: a web page cannot send that unasked."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refused(f"the header Content-Type must be application/json, got {kind[:80]!r}", status=415)
        too_large = Refused(f"the body must have at most {self._most_bytes} bytes", status=413, code="body_too_large")
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self._most_bytes:
            raise too_large

        async def read() -> bytes:
            body = bytearray()
            async for chunk in request.stream():
                body += chunk
                if len(body) > self._most_bytes:
                    raise too_large
            return bytes(body)

        try:
            return await asyncio.wait_for(read(), _BODY_SECONDS)
        except asyncio.TimeoutError:
            raise Refused(f"the body must come within {_BODY_SECONDS:g} seconds", status=408) from None

    def _described(self) -> dict:
        return {"id": self._name, "object": "model", "created": self._started, "owned_by": "pyspec"}

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def _model(self, request: Request) -> Response:
        if request.path_params["name"] != self._name:
            message = f"The model does not exist: this server has '{self._name}'"
            raise Refused(message, status=404, param="model", code="model_not_found")
        return JSONResponse(self._described())

    async def _health(self, request: Request) -> Response:
        state = self._engine.state()
        return JSONResponse({"status": "ok", "running": state["running"], "queued": state["queued"]})

    async def _figures(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _refused(request: Request | None, refused: Refused) -> Response:
    after = refused.retry_after
    headers = {} if after is None else {"Retry-After": str(max(1, round(after)))}
    if refused.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(refused.to_dict(), refused.status, headers)


def _http_error(request: Request, error: HTTPException) -> Response:
    what = {404: "Unknown request URL", 405: "Not allowed"}.get(error.status_code, error.detail)
    shown = request.url.path if len(request.url.path) <= 80 else f"{request.url.path[:77]}..."
    refused = Refused(f"{what}: {request.method} {shown}", status=error.status_code, code="unknown_url")
    return JSONResponse(refused.to_dict(), error.status_code, error.headers)


def _gone(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)  # nobody reads it, but it is counted


def _log_failure(error: Exception) -> None:
    """Logs where an error of ours came from, without its message, which may quote a prompt."""
    log.error("%s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
