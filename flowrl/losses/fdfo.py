"""FDFO: the velocity is pulled along the difference of two samples, towards the better one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from flowrl.errors import UserError
from flowrl.losses.protocol import ReverseLoss
from flowrl.losses.ratio import masked_shares, safe_ratio
from flowrl.types import LossInputs, LossOutput
from flowrl.values.bounds import Limit, Positive
from flowrl.values.check import check_fields


@dataclass(frozen=True, kw_only=True)
class FDFO(ReverseLoss):
    """Mean over samples of -A r + |A| (r - 1)^2 / (2 clip), with r = exp(`pair_log_ratio`), the
    likelihood ratio of a velocity that is pulled from a sample's partner towards the sample itself.

    A is half the difference of the two samples' advantages: with `advantage=from_mean` and a scale
    of 1 that of their rewards. The second term, that of simple policy optimisation (SPO), turns the
    gradient back once r is further than `clip` from 1, which counts as masked.
    `flowrl.objectives.pair` says which way and how far a velocity is pulled.

    Paper: Finite Difference Flow Optimization (McAllister et al. 2026, arXiv 2603.12893), with clip
    0.03, 40 steps, pairs whose noise differs by a little churn, no guidance and no penalty.
    """

    name: ClassVar[str] = "fdfo"
    compares: ClassVar[bool] = True

    clip: Positive
    advantage_clip: Limit

    def __post_init__(self) -> None:
        check_fields(self, "loss")

    def num_selected(self, group_size: int) -> int:
        if group_size % 2:
            raise UserError(
                f"batch.group_size={group_size}: loss=fdfo compares pairs of samples; make it even"
            )
        return group_size

    def __call__(self, inputs: LossInputs) -> LossOutput:
        assert inputs.pair_log_ratio is not None
        advantage = inputs.advantage.clamp(-self.advantage_clip, self.advantage_clip)
        ratio = safe_ratio(inputs.pair_log_ratio, is_ignored=advantage == 0)
        distance = ratio - 1
        losses = -advantage * ratio + advantage.abs() / (2 * self.clip) * distance.square()
        with torch.no_grad():
            positive = (advantage > 0) & (distance > self.clip)
            negative = (advantage < 0) & (distance < -self.clip)
        return LossOutput(losses.mean(), masked_shares(positive=positive, negative=negative))
