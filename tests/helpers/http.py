"""An HTTP application, called in this process or served from a thread of it."""

import asyncio
import json
import threading
from contextlib import contextmanager
from typing import NamedTuple

PATIENCE = 120  # seconds; a test that waits this long has failed


class Response(NamedTuple):
    status: int
    headers: dict
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)


def call(application, method, path, body=b"", headers=None) -> Response:
    """One request, its body as bytes or as what becomes JSON."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"} | (headers or {})
    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "http_version": "1.1"}
    scope["headers"] = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    sent, parts = [], [{"type": "http.request", "body": body, "more_body": False}]

    async def receive():
        if parts:
            return parts.pop()
        await asyncio.Event().wait()  # the client stays

    async def send(message):
        sent.append(message)

    async def run():
        await asyncio.wait_for(application(scope, receive, send), PATIENCE)

    asyncio.run(run())
    named = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return Response(sent[0]["status"], named, b"".join(message.get("body", b"") for message in sent))


@contextmanager
def served(application):
    """The address of the application, which a thread serves meanwhile."""
    import uvicorn

    config = uvicorn.Config(application, port=0, log_config=None, access_log=False, timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.01)
        assert thread.is_alive()
    try:
        yield f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
