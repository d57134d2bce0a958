"""Flow-GRPO: the clipped surrogate of PPO on the per-step ratio of a flow sampler."""

from __future__ import annotations

import torch

from flowrl.types import LossInputs, LossOutput


def grpo(inputs: LossInputs, *, clip_low: float, clip_high: float, advantage_clip: float) -> LossOutput:
    """Mean over samples of max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)).

    Paper: Flow-GRPO (Liu et al. 2025, arXiv 2505.05470), equation of its objective; r = exp(log_prob - old_log_prob)
    under the configured likelihood, A clipped to +-advantage_clip as in its reference code. Published ranges are
    calibrated to mean-reduced log-probabilities.
    """
    advantage = inputs.advantage.clamp(-advantage_clip, advantage_clip)
    log_ratio = inputs.log_prob - inputs.old_log_prob
    with torch.no_grad():
        ratio = log_ratio.exp()
        high = (advantage > 0) & (ratio > 1 + clip_high)
        low = (advantage < 0) & (ratio < 1 - clip_low)
        bound = torch.where(high, log_ratio.new_tensor(1 + clip_high), 1 - clip_low)
    is_clipped = high | low
    # The maximum picks the constant bound exactly where `high` or `low` holds. Masking before the exponential keeps an
    # overflowing ratio out of the backward pass, where 0 times inf would be NaN.
    ratio = torch.where(is_clipped, bound, torch.where(is_clipped, 0.0, log_ratio).exp())
    metrics = {
        "trust/masked_fraction": is_clipped.float().mean(),
        "trust/masked_positive": high.float().mean(),
        "trust/masked_negative": low.float().mean(),
    }
    return LossOutput((-advantage * ratio).mean(), metrics)
