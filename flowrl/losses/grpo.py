"""Flow-GRPO: the clipped surrogate of PPO on the per-step ratio of a flow sampler; Flow-CPS is the
same loss.
"""

from __future__ import annotations

from typing import Literal

from flowrl.losses.clip import (
    clipped_surrogate,
    require_calibration,
    require_positive,
    require_range,
)
from flowrl.types import LossInputs, LossOutput
from flowrl.values.bounds import ClipHigh, ClipLow, Limit


def grpo(
    inputs: LossInputs,
    *,
    clip_low: ClipLow,
    clip_high: ClipHigh,
    advantage_clip: Limit,
    calibrated_for: Literal["gaussian", "unnormalised", "sum_gaussian", "sum_unnormalised"],
) -> LossOutput:
    """Mean over samples of max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)).

    Paper: Flow-GRPO (Liu et al. 2025, arXiv 2505.05470), equation of its objective; r =
    exp(log_prob - old_log_prob) under the configured likelihood, A clipped to +-advantage_clip as
    in its reference code. Published ranges are calibrated to mean-reduced log-probabilities, and to
    one form of them: `calibrated_for` must be that of the configured likelihood, or ValueError is
    raised. Flow-CPS (arXiv 2509.05952) published the unnormalised form.
    """
    require_positive(advantage_clip=advantage_clip)
    require_range(clip_low=clip_low, clip_high=clip_high)
    require_calibration(inputs, calibrated_for=calibrated_for)
    advantage = inputs.advantage.clamp(-advantage_clip, advantage_clip)
    losses, metrics = clipped_surrogate(
        advantage,
        log_ratio=inputs.log_prob - inputs.old_log_prob,
        clip_low=clip_low,
        clip_high=clip_high,
    )
    return LossOutput(losses.mean(), metrics)
