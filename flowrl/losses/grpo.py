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
    ratio = (inputs.log_prob - inputs.old_log_prob).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(-advantage * ratio, -advantage * clipped)
    with torch.no_grad():
        high = (advantage > 0) & (ratio > 1 + clip_high)
        low = (advantage < 0) & (ratio < 1 - clip_low)
        metrics = {
            "trust/masked_fraction": (high | low).float().mean(),
            "trust/masked_positive": high.float().mean(),
            "trust/masked_negative": low.float().mean(),
        }
    return LossOutput(loss.mean(), metrics)
