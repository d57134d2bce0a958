"""A reward server's metrics, in the form that Prometheus reads.

prometheus_client writes them and adds those of the process; what the server itself compares with
its limits are plain numbers, which are read when they are asked for.
"""

from __future__ import annotations

from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Bounds of the histograms: a drawn shape takes a hundredth of a second, a judge half a minute."""

IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Bounds of the sizes of the scorer's calls."""

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""The type of the page that `Counters.text` is."""

# When each counter began is the process's start, which is there once.
disable_created_metrics()


class Counters:
    """Totals since the start, and counts of what is held now: images that wait, their bytes, and
    bytes of bodies.

    `requests` counts answers by their HTTP status. The plain numbers are changed in the event loop
    alone, and so need no lock.
    """

    def __init__(self) -> None:
        self.waiting = 0
        self.waiting_bytes = 0
        self.body_bytes = 0
        # A registry of its own, so that servers of one process do not add up.
        self.registry = CollectorRegistry()
        options: dict[str, Any] = {"namespace": "flowrl", "registry": self.registry}
        self.requests = Counter("requests", "Requests to /score by status.", ["status"], **options)
        self.images = Counter("images", "Images scored, missing ones included.", **options)
        self.missing = Counter("missing", "Images that the scorer could not score.", **options)
        self.batches = Counter("batches", "Calls of the scorer.", **options)
        self.batch_images = Histogram(
            "batch_images", "Images of a call of the scorer.", buckets=IMAGES, **options
        )
        self.scoring_seconds = Histogram(
            "scoring_seconds", "Time of a call of the scorer.", buckets=SECONDS, **options
        )
        self.request_seconds = Histogram(
            "request_seconds",
            "Time from a request's arrival to its answer.",
            buckets=SECONDS,
            **options,
        )
        waiting = Gauge(
            "waiting_images", "Images that wait to be scored or are being scored.", **options
        )
        waiting_bytes = Gauge("waiting_bytes", "What their requests take in memory.", **options)
        body_bytes = Gauge("body_bytes", "Bodies of requests that are not yet decoded.", **options)
        waiting.set_function(lambda: self.waiting)
        waiting_bytes.set_function(lambda: self.waiting_bytes)
        body_bytes.set_function(lambda: self.body_bytes)
        ProcessCollector(registry=self.registry)

    def text(self) -> bytes:
        """Write all of them in the Prometheus text format, version 0.0.4."""
        return generate_latest(self.registry)
