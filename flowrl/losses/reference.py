"""Penalties that hold the policy near the frozen reference, added to any policy loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from flowrl.gaussian import MEAN_KL, GaussianStep, mean_square, velocity_change
from flowrl.schedule import Interval
from flowrl.values.bounds import Guidance, NonNegative
from flowrl.values.check import check_fields


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferencePenalty:
    """`beta` times a distance between the current and the reference step, mean-reduced over latent
    dimensions.

    `kl`: the exact |mean - ref_mean|^2 / (2 std^2). `mean_squared`: |mean - ref_mean|^2
    (Flow-Factory, and the Flow-DPPO recipes). `velocity`: mean (v - ref_v)^2. `flow_grpo`: KL times
    -dt, as published by Flow-GRPO. beta 0 switches the penalty and its forward pass off. The
    reference runs at its own `guidance_scale`.
    """

    form: Literal["kl", "mean_squared", "velocity", "flow_grpo"]
    beta: NonNegative
    guidance_scale: Guidance

    def __post_init__(self) -> None:
        check_fields(self, "penalty")

    def __call__(
        self,
        step: GaussianStep,
        ref_mean: Float[Tensor, "B *X"],
        interval: Interval,
        gain: float,
    ) -> Float[Tensor, "B"]:
        """Compute the distance of each sample, not yet times beta; `gain` is the sampler's d mean /
        d velocity.
        """
        if self.form == "mean_squared":
            return mean_square(step.mean - ref_mean)
        if self.form == "velocity":
            return velocity_change(step, ref_mean, gain)
        distance = MEAN_KL.kl(step, ref_mean)
        return distance * -interval.dt if self.form == "flow_grpo" else distance

    @staticmethod
    def of_velocities(
        velocity: Float[Tensor, "B *X"], ref_velocity: Float[Tensor, "B *X"]
    ) -> Float[Tensor, "B"]:
        """Compute the distance `velocity` of each sample where both velocities are at hand."""
        return mean_square(velocity - ref_velocity)
