"""PAR: the change of an evidence lower bound is fitted to advantages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flowrl.losses.elbo import elbo_and_change
from flowrl.losses.protocol import ForwardLoss
from flowrl.losses.used import keep_used
from flowrl.types import ForwardInputs, LossOutput
from flowrl.values.bounds import Limit


@dataclass(kw_only=True)
class PAR(ForwardLoss):
    """Mean over samples of exp(rho) (A - rho)^2 / 2, where rho = elbo - old_elbo and the first of
    its two places has no gradient.

    The bound and its source are those of `flowrl.losses.elbo`. The log-ratio rho is fitted to the
    advantage, which it equals, up to a constant of the prompt, under the policy that gains most
    after it has paid a KL to the old one. A is clipped to +-advantage_clip. A sample that is not
    used gives no gradient and counts in the mean.

    Since d rho = d elbo, the gradient is -exp(rho) (A - rho) d elbo, which is that of PEPG, in the
    published code as here: runs of the two differ in their rounding and in the loss that is logged,
    which is 0 where the fit is perfect.
    """

    name: ClassVar[str] = "par"

    advantage_clip: Limit

    def __call__(self, inputs: ForwardInputs) -> LossOutput:
        used = keep_used(inputs)
        _, rho = elbo_and_change(used)
        advantage = used.advantage.clamp(-self.advantage_clip, self.advantage_clip)
        losses = rho.detach().exp() * (advantage - rho).square() / 2
        return LossOutput(losses.mean(), {})
