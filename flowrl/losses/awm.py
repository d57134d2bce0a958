"""Advantage-weighted matching: PPO's clipped ratio on the flow-matching error of samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from flowrl.gaussian import mean_square
from flowrl.losses.clip import clipped_surrogate
from flowrl.losses.protocol import ForwardLoss
from flowrl.losses.regression import flow_target, sigma_weight
from flowrl.losses.used import keep_used
from flowrl.types import ForwardInputs, LossOutput
from flowrl.values.bounds import ClipHigh, ClipLow, Limit, Rate

ERROR_OFFSET = 1e-10
"""Added to an error below the generalised Huber root, whose slope at 0 is infinite."""


@dataclass(kw_only=True)
class AWM(ForwardLoss):
    """Mean over samples of max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)).

    r = exp(log_prob - old_log_prob), where the log-probability of a sample noised to sigma is taken
    as minus its weighted flow-matching error, log_prob = -w(e), with e = mean (v - (eps - x0))^2
    over latent dimensions and eps - x0 = (x - x0) / sigma. The weightings are w(e) = e, sigma e,
    sigma^2 e, and the generalised Huber loss sigma ((e + s)^p - s^p) / p with p = `huber_power` and
    s = 1e-10. A is clipped to +-advantage_clip. A sample that is not used has an advantage of 0.

    Paper: Advantage Weighted Matching (Xue et al. 2025, arXiv 2509.25050). Its penalty by the
    velocity of the reference is `penalty=velocity`; that by an average of the weights is left out.
    """

    name: ClassVar[str] = "awm"

    weighting: Literal["uniform", "sigma", "sigma_squared", "generalised_huber"]
    huber_power: Rate
    clip_low: ClipLow
    clip_high: ClipHigh
    advantage_clip: Limit

    def __call__(self, inputs: ForwardInputs) -> LossOutput:
        used = keep_used(inputs)
        log_prob = self.log_prob(used, used.velocity)
        log_ratio = log_prob - self.log_prob(used, used.old_velocity)
        losses, metrics = clipped_surrogate(
            used.advantage,
            log_ratio=log_ratio,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            advantage_clip=self.advantage_clip,
        )
        return LossOutput(losses.mean(), metrics)

    def log_prob(
        self, inputs: ForwardInputs, velocity: Float[Tensor, "B *X"]
    ) -> Float[Tensor, "B"]:
        """Compute minus the weighted flow-matching error of a velocity at the noised samples."""
        error = mean_square(velocity - flow_target(inputs))
        if self.weighting != "generalised_huber":
            return -sigma_weight(inputs.sigma, weighting=self.weighting) * error
        power = self.huber_power
        root = (error + ERROR_OFFSET) ** power - ERROR_OFFSET**power
        return -inputs.sigma * root / power
