"""One method as data: the choices that make up Flow-GRPO, Flow-CPS, Flow-DPPO and the others."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor

from flowrl.advantages import Advantages
from flowrl.diagnostics import Diagnostics
from flowrl.gaussian import Likelihood
from flowrl.losses.protocol import Loss
from flowrl.losses.reference import ReferencePenalty
from flowrl.samplers.protocol import Sampler
from flowrl.samplers.steps import StochasticSteps
from flowrl.samplers.trained import TrainedSteps
from flowrl.schedule import Interval, Schedule, intervals
from flowrl.values.bounds import Guidance, StepCount


def sampler_option(sampler: object) -> str:
    """Return the word for a sampler on the command line: its class in snake case, `flow_sde`.

    A private class that is derived from one of FlowRL's samplers counts as that one, but not for
    naming the protocol among its bases.
    """
    kinds = type(sampler).__mro__
    known = [
        kind
        for kind in kinds
        if kind.__module__.startswith("flowrl.samplers.") and kind.__module__ != Sampler.__module__
    ]
    kind = known[0] if known else kinds[0]
    # An underscore between a small letter and a capital: FlowSDE -> flow_sde, CPS -> cps.
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__name__).lower()


Advantage = Callable[
    [Float[Tensor, "B R"], Float[Tensor, "R"], Int[Tensor, "B"], Bool[Tensor, "B"]], Advantages
]


Credit = Literal["trajectory", "step"]
"""The part of a rollout that has an advantage of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """The parts of a method: sampler, grid, steps, likelihood, loss, penalty and advantage.

    `steps` says which steps are stochastic, and `trained` which of these each sample trains on.
    Rollouts are drawn at `guidance_scale`, and updates evaluate the policies at
    `training_guidance_scale`; None is the same.
    `credit` says whether a sample has one advantage for its whole trajectory, or each of its steps
    one of its own, for what it changed in the score (see `flowrl.training.credit`).
    `flowrl.objectives.check_method` says whether they suit each other.
    """

    sampler: Sampler
    schedule: Schedule
    num_steps: StepCount
    steps: StochasticSteps
    trained: TrainedSteps
    guidance_scale: Guidance
    training_guidance_scale: Guidance | None
    shared_initial_noise: bool
    likelihood: Likelihood
    loss: Loss
    penalty: ReferencePenalty
    advantage: Advantage
    diagnostics: Diagnostics
    credit: Credit

    @property
    def scale_of_updates(self) -> float:
        """The guidance scale at which updates evaluate the current and the old policy."""
        if self.training_guidance_scale is None:
            return self.guidance_scale
        return self.training_guidance_scale

    @property
    def needs_reference(self) -> bool:
        """True where updates evaluate the reference: for the penalty, or for the loss."""
        return self.penalty.beta > 0 or self.loss.needs_reference

    @property
    def intervals(self) -> tuple[Interval, ...]:
        """The steps of the rollout's sigma grid."""
        return intervals(self.schedule, self.num_steps)
