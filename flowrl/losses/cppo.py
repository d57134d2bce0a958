"""CPPO on flow steps: a divergence mask under which the steps of a trajectory share a budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flowrl.errors import UserError
from flowrl.losses.likelihood import require_gaussian
from flowrl.losses.mask import masked_surrogate
from flowrl.losses.protocol import ReverseLoss
from flowrl.types import LogProbForm, LossInputs, LossOutput, Reduction
from flowrl.values.bounds import Limit, NonNegative, Portion, Threshold
from flowrl.values.check import check_fields

LIMITED = "budget/limited"


@dataclass(frozen=True, kw_only=True)
class CPPO(ReverseLoss):
    """Mean over samples of -A r where kept and 0 where dropped; dropped terms count in the mean.

    Dropped if w D > limit and (A > 0 and r > 1, or A < 0 and r < 1), where D is the exact KL(old ||
    current) of the step, per the configured reduction, and

        limit = min(delta, delta (1 + budget_share W) - S).

    The weight w is 1 at the first of a sample's T trained steps and falls evenly to `last_weight`
    at the last. S is the sum of w D over its earlier steps, W that of their w: a step may go as far
    as `delta`, and less where the steps before it went further than `budget_share` times delta on
    average. Flow-DPPO grants every step `delta`, however far its trajectory has gone by then.

    Paper: CPPO (Mao et al. 2026, arXiv 2606.10968), for the tokens of language models, with
    estimated total variations; nobody has published it for flows, where a trajectory's divergence
    is exactly the sum of its steps'. UniRL's code has delta 0.2, a last weight of 0.8 and a budget
    of 0.02 a token, a tenth of delta, which it raises up to twofold by a sequence's 90th percentile
    of D; that is left out here, where a trajectory has a handful of steps.
    """

    name: ClassVar[str] = "cppo"
    looks_back: ClassVar[bool] = True
    metrics: ClassVar[dict[str, str]] = {
        LIMITED: "Share of a method's terms whose earlier steps leave less than delta of the budget"
    }

    delta: Threshold
    budget_share: NonNegative
    last_weight: Portion
    calibrated_for: Literal["kl", "sum_kl"]
    advantage_clip: Limit

    def __post_init__(self) -> None:
        check_fields(self, "loss")

    def check(self, *, form: LogProbForm, reduction: Reduction, sampler: str) -> None:
        require_gaussian(form, loss=self.name)
        needed = "sum_kl" if reduction == "sum" else "kl"
        if self.calibrated_for != needed:
            raise UserError(
                f"loss.calibrated_for={self.calibrated_for}, but likelihood.reduction={reduction}; "
                f"set loss.calibrated_for={needed}, together with a delta that fits"
            )

    def __call__(self, inputs: LossInputs) -> LossOutput:
        is_far, is_limited = self._judge(inputs)
        losses, metrics = masked_surrogate(
            inputs.advantage,
            log_ratio=inputs.log_ratio,
            is_far=is_far,
            advantage_clip=self.advantage_clip,
        )
        metrics["trust/delta"] = losses.new_full((), self.delta)
        metrics[LIMITED] = is_limited.float().mean()
        return LossOutput(losses.mean(), metrics)

    @torch.no_grad()
    def _judge(self, inputs: LossInputs) -> tuple[Bool[Tensor, "B"], Bool[Tensor, "B"]]:
        """Tell which samples are further than their limit, and whose limit is less than delta."""
        earlier = inputs.earlier_kl
        if earlier is None:
            earlier = inputs.kl.new_zeros(len(inputs.kl), 0)
        place = earlier.shape[1]
        weights = self._weights(inputs, place)
        spent = (earlier * weights[:place]).sum(1)
        allowance = self.delta * (1 + self.budget_share * weights[:place].sum()) - spent
        limit = allowance.clamp(max=self.delta)
        # The part of the KL that rounding alone gives is left out, as it is of earlier ones.
        weighed = weights[place] * (inputs.kl - inputs.kl_floor).clamp(min=0)
        return weighed > limit, allowance < self.delta

    def _weights(self, inputs: LossInputs, place: int) -> Float[Tensor, "T"]:
        """Return the weights of the steps up to the `place`-th of a trajectory, counted from 0."""
        last = max(inputs.num_steps - 1, 1)
        places = torch.arange(place + 1, dtype=inputs.kl.dtype, device=inputs.kl.device)
        return 1 - (1 - self.last_weight) * places / last

    @property
    def kl_threshold(self) -> float | None:
        return self.delta
