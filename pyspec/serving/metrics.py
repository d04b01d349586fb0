"""Metrics: what Prometheus reads of a server."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from pyspec.serving.engine import Engine

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
#: What of engine.state() is a level; all else are sums that only grow.
_LEVELS = frozenset("slots running free queued cache_bytes prefix_bytes prefix_memory".split())


class Metrics:
    """Counts of requests and their times, and the state of the engine.

    Attributes:
        first_piece: seconds from a request to the first piece of each text.
        next_piece: seconds from a piece of a text to the next one.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "pyspec_http_requests", "Requests by path and status", ["path", "status"], registry=self._registry
        )
        self._seconds = self._histogram("pyspec_http_request_seconds", "From a request to the end of its response")
        self.first_piece = self._histogram("pyspec_first_piece_seconds", "From a request to a text's first piece")
        self.next_piece = self._histogram("pyspec_next_piece_seconds", "From a piece of a text to the next")
        self._registry.register(self)

    def count(self, path: str, status: int, seconds: float) -> None:
        """Counts a response."""
        self._requests.labels(path, status).inc()
        self._seconds.observe(seconds)

    def text(self) -> bytes:
        """All figures, in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self):
        """The engine's state, for the registry."""
        for name, value in self._engine.state().items():
            family = GaugeMetricFamily if name in _LEVELS else CounterMetricFamily
            yield family(f"pyspec_{name}", f"Engine: {name.replace('_', ' ')}", value=value)

    def _histogram(self, name: str, help_text: str) -> Histogram:
        return Histogram(name, help_text, registry=self._registry, buckets=_SECONDS)
