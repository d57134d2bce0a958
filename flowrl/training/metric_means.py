"""Measurements of one iteration: wall times of its phases, and means of its metrics."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from flowrl.diagnostics import SQUARED
from flowrl.parallel.collectives import gather
from flowrl.types import RewardOutput

Term = tuple[int, int]
"""The numbers of an update and of a trained step."""
Key = tuple[str, Term | None]
"""A metric's name, and the term that its value belongs to, where these are kept apart."""


class Clock:
    """Wall times of the phases of one iteration, each with what a GPU still has to do at its end.

    `device` is the one that computes; None is a CPU.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self.start = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """End the phase `name`, which began with the last lap."""
        if self.device is not None and self.device.type == "cuda":
            # Nothing else waits for the last kernels of a phase, which the next one would pay for.
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.laps[name] = now - self.last
        self.last = now

    def report(self, num_images: int) -> dict[str, float]:
        """Return all laps, and the images per second since the start, of which so many were
        drawn.
        """
        return self.laps | {
            "perf/images_per_second": num_images / (time.perf_counter() - self.start)
        }


class Record:
    """The metrics of one iteration, over all processes: means of the values that are added.

    Names that end in `_max` give maxima. Names that end in `_squared` are mean squares. Each term's
    root is taken once its micro-batches of all processes are together, since a mean of their roots
    would depend on how many there are; the mean of the roots loses the ending.
    """

    def __init__(self) -> None:
        self.values: dict[Key, list[tuple[Tensor | float, float]]] = defaultdict(list)

    def add(
        self, name: str, value: Tensor | float, weight: float = 1.0, term: Term | None = None
    ) -> None:
        """Take in one value of a metric, a number or a tensor of one element.

        `weight` is the number of samples behind it, where that varies. A tensor is read when the
        iteration is over, since each reading makes the host wait for the device; it must not be
        changed until then. A number is rounded to float32, as most metrics are.
        """
        # Mean squares are kept by term, since each term has a root of its own; all else is one
        # mean.
        key = (name, term if name.endswith(SQUARED) else None)
        if isinstance(value, Tensor):
            self.values[key].append((value.detach().reshape(()), weight))
        else:
            self.values[key].append((float(torch.as_tensor(value)), weight))

    def means(self) -> dict[str, float]:
        """Return one number a metric, the same in every process."""
        # All processes pool all values, in rank order, and so come to the same floats.
        pooled: dict[Key, list[tuple[float, float]]] = defaultdict(list)
        for of_one_process in gather(self._on_host()):
            for key, values in of_one_process.items():
                pooled[key] += values
        by_name: dict[str, list[float]] = defaultdict(list)
        for (name, _), values in pooled.items():
            value = _pool(values, name.endswith("_max"))
            if name.endswith(SQUARED):
                value = math.sqrt(value)
            by_name[name.removesuffix(SQUARED)].append(value)
        return {name: sum(values) / len(values) for name, values in by_name.items()}

    def _on_host(self) -> dict[Key, list[tuple[float, float]]]:
        """Read all values, with one copy for each dtype and device that tensors have."""
        batches: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
        for values in self.values.values():
            for value, _ in values:
                if isinstance(value, Tensor):
                    batches[value.dtype, value.device].append(value)
        # In each batch the numbers have the order in which they are asked for again.
        numbers = {kind: iter(torch.stack(batch).tolist()) for kind, batch in batches.items()}
        on_host: dict[Key, list[tuple[float, float]]] = {}
        for key, values in self.values.items():
            on_host[key] = []
            for value, weight in values:
                if isinstance(value, Tensor):
                    number = float(next(numbers[value.dtype, value.device]))
                else:
                    number = value
                on_host[key].append((number, weight))
        return on_host


def record_rewards(record: Record, output: RewardOutput, values: Tensor, is_valid: Tensor) -> None:
    """Add the metrics of an iteration's rewards.

    `values` and `is_valid` are those of all processes; the parts of `output` are this one's.
    """
    has_value = is_valid & values.isfinite()
    if has_value.any():
        record.add("reward/mean", values[has_value].mean())
        record.add("reward/std", values[has_value].std(correction=0))
    record.add("reward/missing", 1 - is_valid.float().mean())
    for name, part in output.parts.items():
        usable = part[output.is_valid & part.isfinite()]
        if len(usable):
            record.add(f"reward/part/{name}", usable.mean(), len(usable))


def _pool(values: Sequence[tuple[float, float]], is_max: bool) -> float:
    """Return the largest of weighted values, or their mean."""
    numbers, weights = torch.tensor(values, dtype=torch.float32).T.contiguous()
    if is_max:
        return float(numbers.max())
    # Equal weights, the usual case, must not round: dividing by their sum can move the last bit.
    if (weights == weights[0]).all():
        return float(numbers.mean())
    return float((numbers * weights).sum() / weights.sum())
