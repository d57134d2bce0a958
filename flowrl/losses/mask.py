"""The mask of Flow-DPPO, which its forward version shares."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flowrl.losses.ratio import masked_shares, moves_down, moves_up, safe_ratio


def masked_surrogate(
    advantage: Float[Tensor, "B"],
    *,
    log_ratio: Float[Tensor, "B"],
    is_far: Bool[Tensor, "B"],
    advantage_clip: float,
) -> tuple[Float[Tensor, "B"], dict[str, Float[Tensor, ""]]]:
    """Compute -A r of each sample, or 0 without a gradient where it is dropped, and the share of
    samples that was dropped on each side. A is clipped to +-advantage_clip first.

    A sample is dropped if it is far from the old policy already and the update moves it further: if
    `is_far` and (A > 0 and r > 1, or A < 0 and r < 1).

    Paper: Flow-DPPO (Ping et al. 2026, arXiv 2606.11025), its mask M.
    """
    advantage = advantage.clamp(-advantage_clip, advantage_clip)
    with torch.no_grad():
        positive = is_far & moves_up(advantage, log_ratio=log_ratio)
        negative = is_far & moves_down(advantage, log_ratio=log_ratio)
        is_dropped = positive | negative
    # The ratio itself carries the gradient: unlike PPO's it is never replaced by a bound.
    surrogate = advantage * safe_ratio(log_ratio, is_ignored=is_dropped | (advantage == 0))
    losses = torch.where(is_dropped, 0.0, -surrogate)
    return losses, masked_shares(positive=positive, negative=negative)
