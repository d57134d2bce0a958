"""GRPO-Guard: a ratio centred at 1 with the same spread at every step, clipped, and gradients
balanced over steps.
"""

from __future__ import annotations

from flowrl.errors import UserError
from flowrl.losses.clip import clipped_surrogate, require_gaussian, require_positive, require_range
from flowrl.types import LossInputs, LossOutput
from flowrl.values.bounds import ClipHigh, ClipLow, Limit


def guard(
    inputs: LossInputs, *, clip_low: ClipLow, clip_high: ClipHigh, advantage_clip: Limit
) -> LossOutput:
    """The clipped surrogate on r = exp((log_prob - old_log_prob + KL) std), divided by -dt.

    Paper: GRPO-Guard (Wang et al. 2025, arXiv 2510.22319), on Flow-SDE steps. With mean-reduced
    Gaussian log-probabilities, which it needs (ValueError otherwise), r = exp(mean(eps (mean -
    old_mean))): the quadratic bias of the log-ratio is gone. Differs from the published script,
    which averages the bias over the batch by accident: here it is each sample's own.
    """
    require_positive(advantage_clip=advantage_clip)
    require_range(clip_low=clip_low, clip_high=clip_high)
    require_gaussian(inputs, loss="guard")
    if inputs.reduction != "mean":
        raise UserError(
            f"loss=guard needs likelihood.reduction=mean, not {inputs.reduction}: its bias is a "
            "mean KL"
        )
    advantage = inputs.advantage.clamp(-advantage_clip, advantage_clip)
    log_ratio = (inputs.log_prob - inputs.old_log_prob + inputs.kl) * inputs.std
    losses, metrics = clipped_surrogate(
        advantage, log_ratio=log_ratio, clip_low=clip_low, clip_high=clip_high
    )
    return LossOutput(losses.mean() / -inputs.dt, metrics)
