"""What one iteration measures of itself: wall times of its phases, and means of its metrics."""

from __future__ import annotations

import time
from collections import defaultdict

import torch
from torch import Tensor


class Clock:
    """Wall times of the phases of one iteration."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """End the phase `name`, which began with the last lap."""
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now

    def report(self, num_samples: int) -> dict[str, float]:
        """All laps, and images per second since the start."""
        return self.laps | {"perf/images_per_second": num_samples / (time.perf_counter() - self.start)}


class Record:
    """Metrics of one iteration: means of what is added, maxima of names that end in `_max`."""

    def __init__(self) -> None:
        self.values: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, name: str, value: Tensor | float) -> None:
        """Take in one value of a metric."""
        self.values[name].append(torch.as_tensor(value).detach().float().cpu())

    def means(self) -> dict[str, float]:
        """One number per metric."""
        return {
            name: float(torch.stack(values).max() if name.endswith("_max") else torch.stack(values).mean())
            for name, values in self.values.items()
        }
