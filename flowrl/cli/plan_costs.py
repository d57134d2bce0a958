"""The numbers of a plan: bytes of each phase, operations behind an image, the fastest choice that
fits a GPU, and the hours that it would take.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass

TERA = 10**12
ENOUGH_TOKENS = 4096
"""Tokens of a micro-batch that are taken to keep a GPU busy: their product with a matrix of 3,072
columns falls into 384 tiles of 128 x 256 numbers, three for each of some 130 multiprocessors, where
a quarter of the tokens leaves some of these without any. No GPU has measured it.
"""
WORTH = 2
"""How many times the rows must fit with recomputed blocks for these to be proposed where some fit
without.
"""


@dataclass(frozen=True)
class Costs:
    """The bytes of one process: `fixed` always, `iteration` on top of it but in evaluations, the
    others on top of these in their phase.
    """

    fixed: int
    iteration: int
    rollout: int
    decode: int
    update: int
    step: int
    evaluation: int

    @property
    def training(self) -> int:
        """Return the most bytes that are there at once while it trains, evaluations left out."""
        phase = max(self.rollout, self.decode, self.update, self.step)
        return self.fixed + self.iteration + phase

    @property
    def peak(self) -> int:
        """Return the most bytes that are there at once."""
        return max(self.training, self.fixed + self.evaluation)

    def beyond(self, other: Costs, times: int) -> Costs:
        """Return the costs that lie `times` the step from `other` to these further on, of which
        those of passes are right: each grows with the rows, or not at all.
        """
        pairs = zip(astuple(other), astuple(self), strict=True)
        return Costs(*(here + times * (here - before) for before, here in pairs))


@dataclass(frozen=True)
class Work:
    """The floating-point operations behind one image that is trained on: all steps of its rollout,
    its decoding, all its terms of updates, and its share of the candidates that were scouted.
    """

    rollout: int
    decode: int
    update: int
    scouting: int = 0

    @property
    def total(self) -> int:
        """Return all operations behind the image."""
        return self.rollout + self.decode + self.update + self.scouting


@dataclass(frozen=True)
class Choice:
    """A micro-batch, and whether blocks are recomputed in updates."""

    max_micro_batch: int
    is_checkpointed: bool


@dataclass(frozen=True)
class Pace:
    """The speed that a GPU is taken to have: its rating in 10^12 operations a second, the shares of
    it that may be reached, and its price an hour.
    """

    tflops: float
    shares: tuple[float, ...]
    price: float | None

    def hours(self, operations: float) -> list[float]:
        """Return the hours that so many operations take, the shortest time first."""
        return sorted(operations / (3600 * TERA * self.tflops * share) for share in self.shares)


def enough(num_tokens: int) -> int:
    """Return the rows of so many tokens that are taken to keep a GPU busy."""
    return -(-ENOUGH_TOKENS // num_tokens)


def fastest(
    tables: Mapping[bool, Mapping[int, Costs]], room: float, num_rows: int, num_enough: int
) -> Choice | None:
    """Choose what should take the least time of all that fits `room` bytes; None where nothing
    does.

    `tables` has the costs by rows with checkpointing (True) and without, as far as the network
    allows it, `num_rows` is the largest micro-batch that there may be, and `num_enough` the rows
    that keep a GPU busy. Blocks are recomputed where nothing fits otherwise, or fewer rows than
    these and WORTH times as many with it.
    """
    most = {True: 0, False: 0}
    for is_checkpointed, costs in tables.items():
        fitting = [rows for rows in costs if costs[rows].peak <= room]
        most[is_checkpointed] = max(fitting, default=0)
    if not any(most.values()):
        return None
    is_enough = most[False] >= min(num_enough, num_rows)
    is_checkpointed = not is_enough and most[True] >= WORTH * most[False]
    return Choice(most[is_checkpointed], is_checkpointed)
