"""Flow-GRPO: PPO's clipped surrogate on the per-step ratio; Flow-CPS is the same loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from flowrl.losses.clip import clipped_surrogate
from flowrl.losses.likelihood import require_calibration
from flowrl.losses.protocol import ReverseLoss
from flowrl.types import LogProbForm, LossInputs, LossOutput, Reduction
from flowrl.values.bounds import ClipHigh, ClipLow, Limit
from flowrl.values.check import check_fields


@dataclass(frozen=True, kw_only=True)
class GRPO(ReverseLoss):
    """Mean over samples of max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)).

    Paper: Flow-GRPO (Liu et al. 2025, arXiv 2505.05470), equation of its objective; r =
    exp(log_prob - old_log_prob) under the configured likelihood, A clipped to +-advantage_clip as
    in its reference code. Published ranges are calibrated to mean-reduced log-probabilities, and to
    one form of them: `calibrated_for` must be that of the configured likelihood. Flow-CPS (arXiv
    2509.05952) published the unnormalised form.
    """

    name: ClassVar[str] = "grpo"

    clip_low: ClipLow
    clip_high: ClipHigh
    advantage_clip: Limit
    calibrated_for: Literal["gaussian", "unnormalised", "sum_gaussian", "sum_unnormalised"]

    def __post_init__(self) -> None:
        check_fields(self, "loss")

    def check(self, *, form: LogProbForm, reduction: Reduction, sampler: str) -> None:
        require_calibration(self.calibrated_for, form=form, reduction=reduction)

    def __call__(self, inputs: LossInputs) -> LossOutput:
        # Once more, for whoever calls the loss without a method that was checked.
        require_calibration(self.calibrated_for, form=inputs.form, reduction=inputs.reduction)
        losses, metrics = clipped_surrogate(
            inputs.advantage,
            log_ratio=inputs.log_ratio,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            advantage_clip=self.advantage_clip,
        )
        return LossOutput(losses.mean(), metrics)
