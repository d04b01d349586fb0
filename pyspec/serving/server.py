"""serve: an application behind uvicorn, until a signal ends it."""

from __future__ import annotations

import asyncio
import copy

import uvicorn
from uvicorn.config import LOGGING_CONFIG

from pyspec.serving.engine import Engine


def serve(application, engine: Engine, *, host: str, port: int, grace: float) -> None:
    """Serves until SIGTERM or SIGINT; then running texts may end, and the engine is closed.

    Args:
        application: pyspec.serving.app.application of the engine.
        host, port: to listen on; port 0 takes a free one, which the log names.
        grace: seconds that running texts have after a signal.
    """
    config = uvicorn.Config(
        application,
        host=host,
        port=port,
        access_log=False,  # the application has its own
        log_config=_logging(),
        server_header=False,
        timeout_graceful_shutdown=int(grace) + 5,  # the engine ends texts before that, so that clients hear of it
    )
    _Server(config, engine, grace).run()


class _Server(uvicorn.Server):
    """A server that closes its engine as it closes."""

    def __init__(self, config: uvicorn.Config, engine: Engine, grace: float):
        super().__init__(config)
        self._engine, self._grace = engine, grace

    async def shutdown(self, sockets=None) -> None:
        closing = asyncio.create_task(asyncio.to_thread(self._engine.close, self._grace))
        await super().shutdown(sockets)
        if self.force_exit:  # a second signal
            await asyncio.to_thread(self._engine.close, 0.0)
        await closing


def _logging() -> dict:
    """uvicorn's way to log, with a line a request beside, and all on stderr."""
    settings = copy.deepcopy(LOGGING_CONFIG)
    settings["loggers"]["pyspec.serving"] = {"handlers": ["default"], "level": "INFO", "propagate": False}
    return settings
