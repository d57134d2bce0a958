"""EPG: a policy gradient on an evidence lower bound, weighted by the ratio that it implies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flowrl.losses.elbo import elbo_and_change
from flowrl.losses.protocol import ForwardLoss
from flowrl.losses.used import keep_used
from flowrl.types import ForwardInputs, LossOutput
from flowrl.values.bounds import Limit


@dataclass(kw_only=True)
class EPG(ForwardLoss):
    """Mean over samples of -exp(rho) A elbo, where rho = elbo - old_elbo has no gradient.

    The bound and its source are those of `flowrl.losses.elbo`. exp(rho) weighs a sample of the old
    policy by the ratio of the current one; nothing bounds it or pulls back, so that the old
    policy's pace and a penalty by the reference are all that holds the policy. A is clipped to
    +-advantage_clip. A sample that is not used gives no gradient and counts in the mean.
    """

    name: ClassVar[str] = "epg"

    advantage_clip: Limit

    def __call__(self, inputs: ForwardInputs) -> LossOutput:
        used = keep_used(inputs)
        elbo, change = elbo_and_change(used)
        rho = change.detach()
        advantage = used.advantage.clamp(-self.advantage_clip, self.advantage_clip)
        losses = -rho.exp() * advantage * elbo
        return LossOutput(losses.mean(), {})
