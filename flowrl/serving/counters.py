"""A reward server's counters are written as Prometheus text."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class Counters:
    """Totals since the start, and counts of what is held now: images that wait, their bytes, and
    bytes of bodies.

    `requests` counts answers by their HTTP status. They are changed in the event loop alone, and so
    need no lock.
    """

    requests: Counter[int] = field(default_factory=Counter)
    request_seconds: float = 0.0
    images: int = 0
    missing: int = 0
    batches: int = 0
    scoring_seconds: float = 0.0
    waiting: int = 0
    waiting_bytes: int = 0
    body_bytes: int = 0

    def text(self) -> str:
        """Write the counters in the Prometheus text format, version 0.0.4."""
        rows = [
            ("images_total", "counter", "Images scored, missing ones included.", self.images),
            ("missing_total", "counter", "Images that the scorer could not score.", self.missing),
            ("batches_total", "counter", "Calls of the scorer.", self.batches),
            ("scoring_seconds_total", "counter", "Time in the scorer.", self.scoring_seconds),
            (
                "request_seconds_total",
                "counter",
                "Time from a request's arrival to its answer.",
                self.request_seconds,
            ),
            (
                "waiting_images",
                "gauge",
                "Images that wait to be scored or are being scored.",
                self.waiting,
            ),
            ("waiting_bytes", "gauge", "What their requests take in memory.", self.waiting_bytes),
            (
                "body_bytes",
                "gauge",
                "Bodies of requests that are not yet decoded.",
                self.body_bytes,
            ),
        ]
        lines = [
            "# HELP flowrl_requests_total Requests to /score by status.",
            "# TYPE flowrl_requests_total counter",
        ]
        # The one metric with a label: a row a status.
        for status, count in sorted(self.requests.items()):
            lines.append(f'flowrl_requests_total{{status="{status}"}} {count}')
        for name, kind, meaning, value in rows:
            lines += [
                f"# HELP flowrl_{name} {meaning}",
                f"# TYPE flowrl_{name} {kind}",
                f"flowrl_{name} {value}",
            ]
        return "\n".join(lines) + "\n"
