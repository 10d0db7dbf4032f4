"""Metrics for Prometheus; those of several worker processes are added up.

prometheus_client decides at its import whether values are shared between processes: by the
variable ``PROMETHEUS_MULTIPROC_DIR``, which ``run`` sets for its workers.
"""

from __future__ import annotations

import os
from functools import lru_cache

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

SHARED = "PROMETHEUS_MULTIPROC_DIR"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_ITEMS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """What a server counts.

    Attributes:
        inside: cost of the admitted items of a tower: tokens of texts, or images.
        cache: texts whose embedding was kept, or not.
        refused: requests refused for lack of room, by queue.
        loaded: number of loaded models.
    """

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "cnclip_requests", "Requests", ["route", "method", "status"], registry=registry
        )
        self._seconds = Histogram(
            "cnclip_request_seconds",
            "Time of a request",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._batch_items = Histogram(
            "cnclip_batch_items", "Items of a batch", ["tower"], buckets=_ITEMS, registry=registry
        )
        self._batch_seconds = Histogram(
            "cnclip_batch_seconds",
            "Time of a batch",
            ["tower"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.inside = Gauge(
            "cnclip_inside",
            "Tokens of texts, or images, that are admitted",
            ["tower"],
            multiprocess_mode="livesum",
            registry=registry,
        )
        self.cache = Counter(
            "cnclip_cached_texts", "Texts looked up in the cache", ["result"], registry=registry
        )
        self.loaded = Gauge(
            "cnclip_models_loaded", "Loaded models", multiprocess_mode="livesum", registry=registry
        )
        self._request_child = lru_cache(1024)(self._requests.labels)
        self._seconds_child = lru_cache(256)(self._seconds.labels)

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._request_child(route, method, str(status)).inc()
        self._seconds_child(route).observe(seconds)

    def batch(self, tower: str, items: int, seconds: float) -> None:
        """Count a batch."""
        self._batch_items.labels(tower).observe(items)
        self._batch_seconds.labels(tower).observe(seconds)

    def render(self) -> bytes:
        """Return the metrics of all workers in the format of Prometheus."""
        if not os.environ.get(SHARED):
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)
