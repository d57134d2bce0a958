"""The choice of a rollout's stochastic steps, which are trained; the others are ODE steps.

A choice has `candidates(num_steps)`, the steps it may ever pick, and `draw(num_steps, iteration,
seed, prompt)`, the picks for the samples of an iteration's `prompt`-th prompt in sampling order.
They must be a function of these alone, and as many for every prompt.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from flowrl.errors import UserError
from flowrl.values.bounds import Count, StepCount, StepNumber
from flowrl.values.check import check_fields


@runtime_checkable
class StochasticSteps(Protocol):
    """A choice of steps, as the head of this module describes it."""

    def candidates(self, num_steps: int) -> tuple[int, ...]:
        """Return the numbers of the steps that may ever be picked, rising, from 0."""
        ...

    def draw(self, num_steps: int, iteration: int, seed: int, prompt: int) -> tuple[int, ...]:
        """Return the numbers of the steps that are picked for a prompt's samples, rising."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AllButLast:
    """Every step but the last (Flow-GRPO), whose Gaussian is too sharp to train on."""

    def candidates(self, num_steps: int) -> tuple[int, ...]:
        return tuple(range(num_steps - 1))

    def draw(self, num_steps: int, iteration: int, seed: int, prompt: int) -> tuple[int, ...]:
        return self.candidates(num_steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A window of `size` consecutive steps inside [low, high) (Flow-GRPO-Fast, MixGRPO).

    The start is drawn anew each iteration, or moves by `size` every `advance_every` iterations and
    wraps around (MixGRPO's progressive window) where that is set.
    """

    size: StepCount
    low: StepNumber
    high: StepCount
    advance_every: Count | None

    def __post_init__(self) -> None:
        check_fields(self, "steps")
        _check_room("size", self.size, self.low, self.high)

    def candidates(self, num_steps: int) -> tuple[int, ...]:
        last_start = max(self._starts())
        return tuple(range(self.low, last_start + self.size))

    def draw(self, num_steps: int, iteration: int, seed: int, prompt: int) -> tuple[int, ...]:
        starts = self._starts()
        if self.advance_every is None:
            # Seeded by a text, whose digest is the same in every process and Python release.
            start = random.Random(f"steps {seed} {iteration}").choice(starts)
        else:
            # The window stays for `advance_every` iterations, and begins anew after the last start.
            start = starts[iteration // self.advance_every % len(starts)]
        return tuple(range(start, start + self.size))

    def _starts(self) -> range:
        """Return the first steps of all windows that fit into [low, high)."""
        distance = 1 if self.advance_every is None else self.size
        return range(self.low, self.high - self.size + 1, distance)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subset:
    """A draw of `count` steps of [low, high) without replacement each iteration.

    Flow-DPPO takes 3 of [0, 6).
    """

    count: StepCount
    low: StepNumber
    high: StepCount

    def __post_init__(self) -> None:
        check_fields(self, "steps")
        _check_room("count", self.count, self.low, self.high)

    def candidates(self, num_steps: int) -> tuple[int, ...]:
        return tuple(range(self.low, self.high))

    def draw(self, num_steps: int, iteration: int, seed: int, prompt: int) -> tuple[int, ...]:
        rng = random.Random(f"steps {seed} {iteration}")
        # Sorted, since a rollout meets the steps in rising order.
        return tuple(sorted(rng.sample(range(self.low, self.high), self.count)))


def _check_room(name: str, number: int, low: int, high: int) -> None:
    """Raise UserError unless [low, high) holds so many steps."""
    if low + number > high:
        raise UserError(f"steps.{name}={number} must fit into [steps.low={low}, steps.high={high})")
