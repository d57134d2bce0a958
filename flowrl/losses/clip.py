"""Ratio clipping as in PPO, which Flow-GRPO, Flow-CPS, GRPO-Guard, TempFlow and AWM share."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from flowrl.losses.ratio import masked_shares, safe_ratio


def clipped_surrogate(
    advantage: Float[Tensor, "B"],
    *,
    log_ratio: Float[Tensor, "B"],
    clip_low: float,
    clip_high: float,
    advantage_clip: float,
) -> tuple[Float[Tensor, "B"], dict[str, Float[Tensor, ""]]]:
    """Compute max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) of each sample, and the share of
    samples that was clipped on each side. A is clipped to +-advantage_clip first.

    Paper: Proximal Policy Optimization (Schulman et al. 2017, arXiv 1707.06347), its equation 7
    with the sign of a loss.
    """
    advantage = advantage.clamp(-advantage_clip, advantage_clip)
    with torch.no_grad():
        ratio = log_ratio.exp()
        high = (advantage > 0) & (ratio > 1 + clip_high)
        low = (advantage < 0) & (ratio < 1 - clip_low)
        is_clipped = high | low
        bound = torch.where(high, log_ratio.new_full((), 1 + clip_high), 1 - clip_low)
    # The maximum picks the constant bound exactly where `high` or `low` holds, and the ratio
    # itself, with its gradient, everywhere else.
    free_ratio = safe_ratio(log_ratio, is_ignored=is_clipped | (advantage == 0))
    clipped_ratio = torch.where(is_clipped, bound, free_ratio)
    return -advantage * clipped_ratio, masked_shares(positive=high, negative=low)
