"""Forward DPPO: the divergence mask of Flow-DPPO on samples that are noised again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from flowrl.gaussian import latent_axes, mean_square
from flowrl.losses.mask import masked_surrogate
from flowrl.losses.protocol import ForwardLoss
from flowrl.losses.regression import flow_target, sigma_weight
from flowrl.losses.used import keep_used
from flowrl.types import ForwardInputs, LossOutput
from flowrl.values.bounds import Limit, Threshold


@dataclass(kw_only=True)
class ForwardDPPO(ForwardLoss):
    """Mean over samples of -A exp(rho) where kept and 0 where dropped; dropped ones count in the
    mean.

    A sample noised to sigma gives rho = w mean ((u - old_v)^2 - (u - v)^2) and D = w mean
    (v - old_v)^2 over latent dimensions, where u = eps - x0 = (x - x0) / sigma. It is dropped if
    D >= delta and (A > 0 and rho > 0, or A < 0 and rho < 0): it is already too far, and the update
    moves it further. The weight w is 1, sigma or sigma^2; A is clipped to +-advantage_clip; a
    sample that is not used has an advantage of 0.

    Our own derivation, which nobody has published. Take N(x - sigma v, s^2 I) for the policy's
    distribution of x0 given x. The log-ratio of the sample that was drawn, divided by the number of
    dimensions, is then rho with w = sigma^2 / (2 s^2), and D is the KL between the old policy and
    the current one, exact since both have one s. With d = v - old_v,

        rho = w mean (2 (u - old_v) d) - D.

    Given x the first term is noise of mean 0 wherever old_v is the velocity that flow matching
    regresses on, the mean of u given x under the old policy; the second is the divergence. AWM
    clips by one draw of their sum, and this mask decides by the divergence alone: the argument of
    Flow-DPPO (arXiv 2606.11025), which makes it for a sampler's steps. There both statements are
    exact; here they hold as far as the Gaussian and the regression do. A threshold belongs to a
    weighting, a base model and a resolution.
    """

    name: ClassVar[str] = "forward_dppo"

    delta: Threshold
    weighting: Literal["uniform", "sigma", "sigma_squared"]
    advantage_clip: Limit

    def __call__(self, inputs: ForwardInputs) -> LossOutput:
        used = keep_used(inputs)
        losses, metrics = masked_surrogate(
            used.advantage,
            log_ratio=self.log_ratio(used),
            is_far=self.divergence(used) >= self.delta,
            advantage_clip=self.advantage_clip,
        )
        metrics["trust/delta"] = losses.new_full((), self.delta)
        metrics["trust/divergence_old"] = self._mean_divergence(inputs)
        return LossOutput(losses.mean(), metrics)

    def log_ratio(self, inputs: ForwardInputs) -> Float[Tensor, "B"]:
        """Compute rho of each sample, as ((u - old_v) + (u - v)) (v - old_v), which is exactly 0
        where the velocities are equal and rounds relative to their difference.
        """
        target = flow_target(inputs)
        moved = inputs.velocity - inputs.old_velocity
        product = ((target - inputs.old_velocity) + (target - inputs.velocity)) * moved
        return sigma_weight(inputs.sigma, weighting=self.weighting) * product.mean(
            latent_axes(product)
        )

    def divergence(self, inputs: ForwardInputs) -> Float[Tensor, "B"]:
        """Compute D of each sample."""
        moved = mean_square(inputs.velocity - inputs.old_velocity)
        return sigma_weight(inputs.sigma, weighting=self.weighting) * moved

    @torch.no_grad()
    def _mean_divergence(self, inputs: ForwardInputs) -> Float[Tensor, ""]:
        """Compute the mean of D over all samples: one that is not used counts, too, but as 0 where
        its D is no finite number.
        """
        divergence = self.divergence(inputs)
        is_counted = inputs.is_used | divergence.isfinite()
        return torch.where(is_counted, divergence, 0.0).mean()
