"""The choice of the samples that are trained on, among many candidates of a prompt.

A choice has `candidates`, the samples of each prompt that are drawn and scored, `num_steps`, the
steps that each of these takes, and `choose(scores, count)`, which must be a function of these
alone: all processes ask it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from flowrl.values.bounds import Samples, StepCount
from flowrl.values.check import check_fields


@dataclass(frozen=True, slots=True)
class Kept:
    """The candidates of one prompt that are kept, by their numbers: those among the best, among the
    worst, and those without a score that stand in where too few have one.
    """

    best: tuple[int, ...]
    worst: tuple[int, ...]
    unscored: tuple[int, ...] = ()

    @property
    def numbers(self) -> list[int]:
        """The numbers of all, in rising order: an update that takes a share of a group must not get
        its best ones alone.
        """
        return sorted((*self.best, *self.worst, *self.unscored))


class Choice(Protocol):
    """A choice among candidates, as the head of this module describes it."""

    @property
    def candidates(self) -> int:
        """Return the number of a prompt's samples that are drawn to choose from."""
        ...

    @property
    def num_steps(self) -> int:
        """Return the number of steps that each of them takes."""
        ...

    def choose(self, scores: Sequence[float | None], count: int) -> Kept:
        """Keep `count` different candidates, of which these are the scores; None has none."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BestWorst:
    """The best and the worst of `candidates` samples, which take `num_steps` steps each (Sol-RL, Li
    et al. 2026, arXiv 2604.06916: 12 and 12 of 96, in 6 of 10 steps).

    Half of those that are kept are the best, and of an odd number one more is among the worst, as
    in its code. Of equal scores the lower number counts as better, so that a group of equal scores
    keeps its first and its last ones; its code leaves ties to `torch.topk`, which may keep a sample
    twice. One without a score is kept only where fewer have one than are kept, the lowest numbers
    first.
    """

    candidates: Samples
    num_steps: StepCount

    def __post_init__(self) -> None:
        check_fields(self, "scouting")

    def choose(self, scores: Sequence[float | None], count: int) -> Kept:
        by_number = {number: score for number, score in enumerate(scores) if score is not None}
        unscored = [number for number, score in enumerate(scores) if score is None]
        # Sorting is stable, so that equal scores keep the order of their numbers.
        ranked = sorted(by_number, key=lambda number: -by_number[number])
        num_scored = min(count, len(ranked))
        num_best = num_scored // 2
        num_worst = num_scored - num_best
        return Kept(
            best=tuple(ranked[:num_best]),
            worst=tuple(ranked[len(ranked) - num_worst :]),
            unscored=tuple(unscored[: count - num_scored]),
        )
