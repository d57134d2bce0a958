"""The choice of a rollout's stochastic steps; the others are ODE steps. Which of the stochastic
ones are trained on is `flowrl.samplers.trained`.

A choice has `candidates(num_steps)`, the steps it may ever pick, and `draw(num_steps, iteration,
seed, prompt)`, the picks for the samples of an iteration's `prompt`-th prompt in sampling order.
They must be a function of these alone, and as many for every prompt of an iteration. The choices
here are alike for all prompts; one of your own may differ between them.
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

    Its place is drawn anew each iteration (Flow-GRPO-Fast). Where `advance_every` is set, it slides
    by `stride` steps every so many iterations instead, from `low` on; a `stride` of null is its
    size. After the last place it begins anew (`rolls_back`), or stays there. The last place is that
    where the window still fits, or with `shrinks` goes on while a step is left in it.

    Paper: MixGRPO (Li et al. 2025, arXiv 2507.21802), `advance_every` 25, `stride` 1 and `size` 4.
    The paper's window stays at the last place where it fits. The released script shrinks it and
    rolls back, over the steps but the last two; it also has one more place, without a step, at
    which it draws images for 25 iterations and trains on nothing, which is left out here.
    """

    size: StepCount
    low: StepNumber
    high: StepCount
    advance_every: Count | None
    stride: StepCount | None
    rolls_back: bool
    shrinks: bool

    def __post_init__(self) -> None:
        check_fields(self, "steps")
        _check_room("size", self.size, self.low, self.high)
        has_sliding_options = self.stride is not None or self.shrinks or not self.rolls_back
        if has_sliding_options and self.advance_every is None:
            raise UserError(
                f"steps.stride={self.stride}, steps.rolls_back={self.rolls_back} and "
                f"steps.shrinks={self.shrinks} are for a window that slides, but "
                "steps.advance_every=null draws its place: set steps.advance_every, or leave these "
                "three at null, true and false"
            )

    def candidates(self, num_steps: int) -> tuple[int, ...]:
        return tuple(sorted({k for start in self._starts() for k in self._at(start)}))

    def draw(self, num_steps: int, iteration: int, seed: int, prompt: int) -> tuple[int, ...]:
        starts = self._starts()
        if self.advance_every is None:
            # Seeded by a text, whose digest is the same in every process and Python release.
            start = random.Random(f"steps {seed} {iteration}").choice(starts)
        else:
            place = iteration // self.advance_every
            last = len(starts) - 1
            start = starts[place % len(starts) if self.rolls_back else min(place, last)]
        return self._at(start)

    def _at(self, start: int) -> tuple[int, ...]:
        """Return the steps of the window at one of its places."""
        return tuple(range(start, min(start + self.size, self.high)))

    def _starts(self) -> range:
        """Return the first steps of the window at all its places in [low, high)."""
        distance = 1 if self.advance_every is None else self.stride or self.size
        smallest = 1 if self.shrinks else self.size
        return range(self.low, self.high - smallest + 1, distance)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """One step of [low, high) for each prompt, at which its samples part.

    With a shared initial noise the samples of a prompt are equal up to that step, so that their
    rewards differ by what it drew alone (TempFlow-GRPO, He et al. 2025, arXiv 2508.04324). Steps
    are dealt evenly: `in_a_row` prompts have one and the same, the next ones another, and all have
    been had before one comes again. The order is drawn anew each iteration. Prompts in a row make
    micro-batches together.
    """

    low: StepNumber
    high: StepCount
    in_a_row: Count

    def __post_init__(self) -> None:
        check_fields(self, "steps")
        if self.low >= self.high:
            raise UserError(f"steps.low={self.low} must be below steps.high={self.high}")

    def candidates(self, num_steps: int) -> tuple[int, ...]:
        return (*range(self.low, self.high),)

    def draw(self, num_steps: int, iteration: int, seed: int, prompt: int) -> tuple[int, ...]:
        steps = range(self.low, self.high)
        deal, place = divmod(prompt // self.in_a_row, len(steps))
        # Seeded by a text, whose digest is the same in every process and Python release.
        rng = random.Random(f"steps {seed} {iteration} {deal}")
        return (rng.sample(steps, len(steps))[place],)


def _check_room(name: str, number: int, low: int, high: int) -> None:
    """Raise UserError unless [low, high) holds so many steps."""
    if low + number > high:
        raise UserError(f"steps.{name}={number} must fit into [steps.low={low}, steps.high={high})")
