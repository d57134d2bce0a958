"""Ratio clipping as in PPO, which Flow-GRPO, Flow-CPS and GRPO-Guard share."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def clipped_surrogate(
    advantage: Float[Tensor, "B"], *, log_ratio: Float[Tensor, "B"], clip_low: float, clip_high: float
) -> tuple[Float[Tensor, "B"], dict[str, Float[Tensor, ""]]]:
    """max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) of each sample, and what share was clipped on each side."""
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
    return -advantage * ratio, metrics


def require_form(name: str, *, expected: str, actual: str) -> None:
    """Raise ValueError where a clip range meets another log-probability than the one it was calibrated to."""
    if expected not in ("gaussian", "unnormalised"):
        raise ValueError(f"{name}={expected!r} must be gaussian or unnormalised")
    if expected != actual:
        raise ValueError(
            f"{name}={expected}, but likelihood.form={actual}: a clip range calibrated for one form means another "
            f"trust region with the other; set {name}={actual} together with a range that fits it"
        )
