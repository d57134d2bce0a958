"""The choice of the steps that each sample trains on, among the stochastic ones of its rollout.

Which steps are stochastic, `steps=`, and which of them are trained, `trained=`, are two things: a
step may draw noise, so that samples of a group differ, without being trained on. A trajectory keeps
what may be trained. A choice has `candidates(stochastic)`, the steps that some sample may train on,
and `draw(stochastic, iteration, seed, prompt, sample)`, those of the `sample`-th sample of an
iteration's `prompt`-th prompt. Both must be a function of these alone, `draw` must pick at least
one, and as many for every sample of an iteration.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from flowrl.values.bounds import Portion
from flowrl.values.check import check_fields
from flowrl.values.portion import portion


@runtime_checkable
class TrainedSteps(Protocol):
    """A choice among stochastic steps, as the head of this module describes it."""

    def candidates(self, stochastic: tuple[int, ...]) -> tuple[int, ...]:
        """Return those of a rollout's stochastic steps that any sample may train on, rising."""
        ...

    def draw(
        self, stochastic: tuple[int, ...], iteration: int, seed: int, prompt: int, sample: int
    ) -> tuple[int, ...]:
        """Return those of its rollout's stochastic steps that one sample trains on, rising."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AllStochastic:
    """Every stochastic step, for every sample."""

    def candidates(self, stochastic: tuple[int, ...]) -> tuple[int, ...]:
        return stochastic

    def draw(
        self, stochastic: tuple[int, ...], iteration: int, seed: int, prompt: int, sample: int
    ) -> tuple[int, ...]:
        return stochastic


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomShare:
    """A `share` of the stochastic steps, rounded down but at least one, drawn without replacement
    for each sample (DanceGRPO, Xue et al. 2025, arXiv 2505.07818).

    Its script permutes the steps but the last of each sample and trains on the first
    int((K - 1) 0.6). An iteration's draw holds for all its inner epochs.
    """

    share: Portion

    def __post_init__(self) -> None:
        check_fields(self, "trained")

    def candidates(self, stochastic: tuple[int, ...]) -> tuple[int, ...]:
        return stochastic

    def draw(
        self, stochastic: tuple[int, ...], iteration: int, seed: int, prompt: int, sample: int
    ) -> tuple[int, ...]:
        # Seeded by a text, whose digest is the same in every process and Python release.
        rng = random.Random(f"trained {seed} {iteration} {prompt} {sample}")
        return tuple(sorted(rng.sample(stochastic, portion(len(stochastic), self.share))))
