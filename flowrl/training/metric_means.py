"""What one iteration measures of itself: wall times of its phases, and means of its metrics."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, distributed

from flowrl.diagnostics import SQUARED
from flowrl.models.weights import first_not_finite
from flowrl.types import RewardOutput

Shared = TypeVar("Shared")
Term = tuple[int, int]
"""The numbers of an update and of a trained step."""


class NotFinite(RuntimeError):
    """A gradient, advantage or weight is infinite or NaN: what is made of it would be no number
    either.
    """


def require_finite(weights: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise NotFinite, naming the first, where a tensor holds a NaN or an infinity; `weights` are
    tensors by kind.

    Must come before weights are evaluated, saved or exported, in all processes alike.
    """
    named = {
        f"{kind} {name}": value
        for kind, tensors in weights.items()
        for name, value in tensors.items()
    }
    if first := first_not_finite(named):
        kind, _, name = first.partition(" ")
        raise NotFinite(
            f"the weight {name} ({kind}) holds NaN or infinity, so it is not evaluated, saved or "
            "exported"
        )


class Clock:
    """Wall times of the phases of one iteration."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """End the phase `name`, which began with the last lap."""
        now = time.perf_counter()
        self.laps[name] = now - self.last
        self.last = now

    def report(self, num_samples: int) -> dict[str, float]:
        """All laps, and images per second since the start."""
        return self.laps | {
            "perf/images_per_second": num_samples / (time.perf_counter() - self.start)
        }


class Record:
    """Metrics of one iteration: means of what is added, maxima of names that end in `_max`, over
    all processes.

    Names that end in `_squared` are mean squares. Each term's root is taken once its micro-batches
    of all processes are together, since a mean of their roots would depend on how many there are;
    the mean of the roots loses the ending.
    """

    def __init__(self) -> None:
        self.values: dict[tuple[str, Term | None], list[tuple[float, float]]] = defaultdict(list)

    def add(
        self, name: str, value: Tensor | float, weight: float = 1.0, term: Term | None = None
    ) -> None:
        """Take in one value of a metric; `weight` is the number of samples behind it where that
        varies.
        """
        key = (name, term if name.endswith(SQUARED) else None)
        self.values[key].append((float(torch.as_tensor(value).detach()), weight))

    def means(self) -> dict[str, float]:
        """One number per metric, the same in every process."""
        pooled: dict[tuple[str, Term | None], list[tuple[float, float]]] = defaultdict(list)
        for part in gather(dict(self.values)):
            for key, values in part.items():
                pooled[key] += values
        found: dict[str, list[float]] = defaultdict(list)
        for (name, _), values in pooled.items():
            value = _pool(values, name.endswith("_max"))
            found[name.removesuffix(SQUARED)].append(
                math.sqrt(value) if name.endswith(SQUARED) else value
            )
        return {name: sum(values) / len(values) for name, values in found.items()}


def record_rewards(record: Record, output: RewardOutput, values: Tensor, is_valid: Tensor) -> None:
    """The metrics of an iteration's rewards: `values` and `is_valid` of all processes, parts of
    this one's samples.
    """
    if (has_value := is_valid & values.isfinite()).any():
        record.add("reward/mean", values[has_value].mean())
        record.add("reward/std", values[has_value].std(correction=0))
    record.add("reward/missing", 1 - is_valid.float().mean())
    for name, part in output.parts.items():
        usable = part[output.is_valid & part.isfinite()]
        if len(usable):
            record.add(f"reward/part/{name}", usable.mean(), len(usable))


def gather(own: Shared) -> list[Shared]:
    """What all processes have, in rank order; by itself without others."""
    if not is_distributed():
        return [own]
    parts: list[Shared] = [own] * distributed.get_world_size()
    distributed.all_gather_object(parts, own)
    return parts


def is_distributed() -> bool:
    """Whether this process is one of several."""
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def _pool(values: Sequence[tuple[float, float]], is_max: bool) -> float:
    numbers, weights = torch.tensor(values, dtype=torch.float32).T.contiguous()
    if is_max:
        return float(numbers.max())
    is_even = bool((weights == weights[0]).all())
    return float(numbers.mean() if is_even else (numbers * weights).sum() / weights.sum())
