"""Penalties that hold the policy near the frozen reference, added to any policy loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from flowrl.errors import UserError
from flowrl.gaussian import MEAN_KL, GaussianStep, mean_square
from flowrl.schedule import Interval
from flowrl.values.bounds import Guidance, NonNegative


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
        if self.form not in ("kl", "mean_squared", "velocity", "flow_grpo"):
            raise UserError(
                f"penalty.form={self.form!r} must be kl, mean_squared, velocity or flow_grpo"
            )
        if self.beta < 0:
            raise UserError(f"penalty.beta={self.beta} must not be negative")

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
            # Both means belong to one state, so they differ by their velocities times the gain.
            return mean_square((step.mean - ref_mean) / gain)
        distance = MEAN_KL.kl(step, ref_mean)
        return distance * -interval.dt if self.form == "flow_grpo" else distance
