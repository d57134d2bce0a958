"""Proximal ELBO policy gradient: a policy gradient on an evidence lower bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flowrl.losses.elbo import elbo_and_change
from flowrl.losses.protocol import ForwardLoss
from flowrl.losses.used import keep_used
from flowrl.types import ForwardInputs, LossOutput
from flowrl.values.bounds import Limit


@dataclass(kw_only=True)
class PEPG(ForwardLoss):
    """Mean over samples of -exp(rho) (A - rho) elbo, where rho = elbo - old_elbo has no gradient.

    The bound of a sample noised to sigma is elbo = -mean (x - sigma v - x0)^2 / w over latent
    dimensions, with w the detached mean absolute error of the same estimate. The factor A - rho is
    what a penalty by the KL to the old policy leaves in the gradient, so nothing is clipped but A,
    to +-advantage_clip. A sample that is not used gives no gradient and counts in the mean.

    Source: the study of objectives and estimators published as rethinking-diffusion-rl (ICML 2026),
    its PEPG. Its recipes take A = 0.1 (r - mean_g), not divided by a standard deviation and not
    clipped; the variant without exp(rho) is left out.
    """

    name: ClassVar[str] = "pepg"

    advantage_clip: Limit

    def __call__(self, inputs: ForwardInputs) -> LossOutput:
        used = keep_used(inputs)
        elbo, change = elbo_and_change(used)
        rho = change.detach()
        advantage = used.advantage.clamp(-self.advantage_clip, self.advantage_clip)
        # Neither factor has a gradient; that of the loss is -ratio (A - rho) d elbo.
        losses = -rho.exp() * (advantage - rho) * elbo
        return LossOutput(losses.mean(), {})
