"""Prometheus metrics: requests, time to the first token, speed, and what the engine counts.

>>> metrics = Metrics(engine=lambda: service.engine, streams=lambda: len(service.generations))
>>> metrics.text()
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from server.generation import Generation

if TYPE_CHECKING:
    from inference.engine import Engine

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)  # buckets of the histograms


class Metrics:
    """Counters and histograms in Prometheus' format; the engine's own numbers are read at each scrape.

    engine: returns the engine, None while there is none. streams: returns the number of texts that clients wait for.
    """

    def __init__(self, engine: Callable[[], Engine | None], streams: Callable[[], int]):
        self.engine, self.streams, self.registry = engine, streams, CollectorRegistry()
        labels = ("route", "method", "status")
        self.requests = Counter("vlg_requests", "Requests answered.", labels, registry=self.registry)
        self.seconds = Histogram(
            "vlg_request_seconds", "Time to the end of the answer.", ("route",), buckets=SECONDS, registry=self.registry
        )
        self.first = Histogram(
            "vlg_first_token_seconds",
            "Time to a text's first token, waiting included.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.gap = Histogram(
            "vlg_between_tokens_seconds",
            "Time between two tokens of a text.",
            buckets=(0.0002, 0.0005, 0.001, 0.002, *SECONDS[:9]),
            registry=self.registry,
        )
        self.speed = Histogram(
            "vlg_text_tokens_per_second",
            "Speed of one request's text after its first token.",
            buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000),
            registry=self.registry,
        )
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """The engine's own numbers (called by the registry)."""
        engine = self.engine()
        yield GaugeMetricFamily("vlg_ready", "1 when the model is loaded.", value=float(engine is not None))
        yield GaugeMetricFamily("vlg_streams", "Texts somebody waits for.", value=float(self.streams()))
        if engine is None:
            return
        stats = engine.stats()
        for key, text in (
            ("running", "Texts being written."),
            ("waiting", "Requests in the queue."),
            ("tokens_per_s", "Tokens written a second, all texts together."),
        ):
            yield GaugeMetricFamily(f"vlg_{key}", text, value=float(stats.get(key, 0)))
        for key, text in (
            ("rejected", "Requests refused because the queue was full."),
            ("finished", "Requests completed."),
            ("tokens", "Tokens written."),
        ):
            yield CounterMetricFamily(f"vlg_{key}", text, value=float(stats.get(key, 0)))

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def count_request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count an answered HTTP request."""
        self.requests.labels(route, method, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def count_generation(self, generation: Generation) -> None:
        """Record the speed of a generation that has ended."""
        if generation.first_s is not None and generation.tokens > 1:
            rest = time.monotonic() - generation.begun - generation.first_s
            if rest > 0:
                self.speed.observe((generation.tokens - 1) / rest)
