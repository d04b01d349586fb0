"""A server in this process, over a small random Llama."""

from types import SimpleNamespace

import pytest

from tests.helpers.talking_llama import talking_llama

SLOTS, QUEUE = 4, 8


@pytest.fixture(scope="module")
def server():
    """Its application, engine and model name, and `alone`, a runner of the same weights."""
    pytest.importorskip("starlette")
    pytest.importorskip("prometheus_client")
    from pyspec.serving.app import Application
    from pyspec.serving.engine import Engine

    with Engine(talking_llama(), slots=SLOTS, queue=QUEUE, budget=8) as engine:
        yield SimpleNamespace(application=Application(engine, "small"), engine=engine, alone=talking_llama())
