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

    The bound and its source are those of `flowrl.losses.elbo`. The factor A - rho is what a penalty
    by the KL to the old policy leaves in the gradient, so nothing is clipped but A, to
    +-advantage_clip. A sample that is not used gives no gradient and counts in the mean.
    """

    name: ClassVar[str] = "pepg"

    advantage_clip: Limit

    def __call__(self, inputs: ForwardInputs) -> LossOutput:
        used = keep_used(inputs)
        elbo, change = elbo_and_change(used)
        rho = change.detach()
        advantage = used.advantage.clamp(-self.advantage_clip, self.advantage_clip)
        # Neither factor has a gradient; that of the loss is -exp(rho) (A - rho) d elbo.
        losses = -rho.exp() * (advantage - rho) * elbo
        return LossOutput(losses.mean(), {})
