"""Flow-DPPO: the divergence mask, a trust region that decides by the exact divergence of a step."""

from __future__ import annotations

from typing import Literal

import torch

from flowrl.types import LossInputs, LossOutput


def dppo(
    inputs: LossInputs, *, delta: float, divergence: Literal["kl", "tv", "velocity"], advantage_clip: float
) -> LossOutput:
    """Mean over samples of -A r where kept and 0 where dropped; dropped terms count in the mean.

    Dropped if D >= delta and (A > 0 and r > 1, or A < 0 and r < 1): the step is already too far and the update moves
    it further. Corrective updates always keep their gradient, and r is never clipped.

    Paper: Flow-DPPO (Ping et al. 2026, arXiv 2606.11025), its mask M. D is KL(old || current) under the configured
    reduction (mean in every published threshold: 1e-6 in the authors' recipes, 1e-5 in UniRL's), or TV, or mean
    (v - old_v)^2 (`velocity`, Flow-Factory's `v-based`).
    Differs from Flow-Factory's code, which multiplies by the mask: 0 times an overflown ratio is NaN, `where` is not.
    """
    if divergence not in ("kl", "tv", "velocity"):
        raise ValueError(f"loss.divergence={divergence!r} must be kl, tv or velocity")
    advantage = inputs.advantage.clamp(-advantage_clip, advantage_clip)
    log_ratio = inputs.log_prob - inputs.old_log_prob
    with torch.no_grad():
        ratio = log_ratio.exp()
        distance = {"kl": inputs.kl, "tv": inputs.tv, "velocity": inputs.velocity}[divergence]
        is_far = distance >= delta
        positive = is_far & (advantage > 0) & (ratio > 1)
        negative = is_far & (advantage < 0) & (ratio < 1)
        is_dropped = positive | negative
    # Masking before the exponential, too: behind `where` alone an infinite ratio still gives 0 times inf backwards.
    surrogate = advantage * torch.where(is_dropped, 0.0, log_ratio).exp()
    loss = torch.where(is_dropped, 0.0, -surrogate).mean()
    metrics = {
        "trust/masked_fraction": is_dropped.float().mean(),
        "trust/masked_positive": positive.float().mean(),
        "trust/masked_negative": negative.float().mean(),
    }
    return LossOutput(loss, metrics)
