"""TempFlow-GRPO's weight: Flow-GRPO's loss, in which steps with more noise count more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from flowrl.losses.clip import clipped_surrogate
from flowrl.losses.likelihood import require_calibration
from flowrl.losses.protocol import ReverseLoss
from flowrl.types import LogProbForm, LossInputs, LossOutput, Reduction
from flowrl.values.bounds import ClipHigh, ClipLow, Limit, Positive
from flowrl.values.check import check_fields


@dataclass(frozen=True, kw_only=True)
class TempFlow(ReverseLoss):
    """The clipped surrogate of Flow-GRPO times std_weight std, with the std of the whole step.

    Paper: TempFlow-GRPO (He et al. 2025, arXiv 2508.04324), its weight by noise; its code has 2.25
    std, on Flow-SDE steps at 0.7. There 2.25 makes the mean weight of the first nine steps of
    SD3.5's grid of ten 1. The paper's other half, rollouts that branch at one step whose reward
    that step then gets, is left out: here all steps of a sample share its advantage.
    """

    name: ClassVar[str] = "tempflow"

    clip_low: ClipLow
    clip_high: ClipHigh
    advantage_clip: Limit
    std_weight: Positive
    calibrated_for: Literal["gaussian", "sum_gaussian"]

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
        return LossOutput(self.std_weight * inputs.std * losses.mean(), metrics)
