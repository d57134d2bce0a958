"""GRPO-Guard: a ratio centred at 1 with equal spread at every step, clipped and balanced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flowrl.errors import UserError
from flowrl.losses.clip import clipped_surrogate
from flowrl.losses.likelihood import require_gaussian
from flowrl.losses.protocol import ReverseLoss
from flowrl.types import LogProbForm, LossInputs, LossOutput, Reduction
from flowrl.values.bounds import ClipHigh, ClipLow, Limit
from flowrl.values.check import check_fields


@dataclass(frozen=True, kw_only=True)
class Guard(ReverseLoss):
    """The clipped surrogate on r = exp((log_prob - old_log_prob + KL) std), divided by -dt.

    Paper: GRPO-Guard (Wang et al. 2025, arXiv 2510.22319), on Flow-SDE steps. With mean-reduced
    Gaussian log-probabilities, which it needs, r = exp(mean(eps (mean - old_mean))): the quadratic
    bias of the log-ratio is gone. Differs from the published script, which averages the bias over
    the batch by accident: here it is each sample's own.
    """

    name: ClassVar[str] = "guard"

    clip_low: ClipLow
    clip_high: ClipHigh
    advantage_clip: Limit

    def __post_init__(self) -> None:
        check_fields(self, "loss")

    def check(self, *, form: LogProbForm, reduction: Reduction, sampler: str) -> None:
        self._check_likelihood(form, reduction)
        if sampler != "flow_sde":
            raise UserError(
                f"loss=guard needs sampler=flow_sde, not {sampler}: its centred ratio and its "
                "division by -dt belong to that step"
            )

    def _check_likelihood(self, form: LogProbForm, reduction: Reduction) -> None:
        require_gaussian(form, loss=self.name)
        if reduction != "mean":
            raise UserError(
                f"loss=guard needs likelihood.reduction=mean, not {reduction}: its bias is a mean "
                "KL"
            )

    def __call__(self, inputs: LossInputs) -> LossOutput:
        # Once more, for whoever calls the loss without a method that was checked.
        self._check_likelihood(inputs.form, inputs.reduction)
        # The log-ratio is mean(eps d) / std - KL, with d = mean - old_mean: what is left is
        # mean(eps d), which is centred at 0 and spreads alike at all steps.
        log_ratio = (inputs.log_ratio + inputs.kl) * inputs.std
        losses, metrics = clipped_surrogate(
            inputs.advantage,
            log_ratio=log_ratio,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            advantage_clip=self.advantage_clip,
        )
        return LossOutput(losses.mean() / -inputs.dt, metrics)
