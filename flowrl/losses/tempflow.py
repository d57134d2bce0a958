"""TempFlow-GRPO's weight: Flow-GRPO's loss, in which steps with more noise count more."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from flowrl.losses.grpo import GRPO
from flowrl.types import LossInputs, LossOutput
from flowrl.values.bounds import Positive


@dataclass(frozen=True, kw_only=True)
class TempFlow(GRPO):
    """The clipped surrogate of Flow-GRPO times std_weight std, with the std of the whole step.

    Paper: TempFlow-GRPO (He et al. 2025, arXiv 2508.04324), its weight by noise; its code has 2.25
    std, on Flow-SDE steps at 0.7. There 2.25 makes the mean weight of the first nine steps of
    SD3.5's grid of ten 1. The paper's other half, rollouts that branch at one step, which then has
    their reward for itself, is `flowrl.samplers.steps.Branch`.
    """

    name: ClassVar[str] = "tempflow"

    std_weight: Positive
    calibrated_for: Literal["gaussian", "sum_gaussian"]

    def __call__(self, inputs: LossInputs) -> LossOutput:
        output = super().__call__(inputs)
        return replace(output, loss=self.std_weight * inputs.std * output.loss)
