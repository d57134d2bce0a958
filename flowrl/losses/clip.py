"""Ratio clipping as in PPO, which Flow-GRPO, Flow-CPS and GRPO-Guard share."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from flowrl.errors import UserError


def clipped_surrogate(
    advantage: Float[Tensor, "B"],
    *,
    log_ratio: Float[Tensor, "B"],
    clip_low: float,
    clip_high: float,
) -> tuple[Float[Tensor, "B"], dict[str, Float[Tensor, ""]]]:
    """max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) of each sample, and what share was clipped
    on each side.
    """
    with torch.no_grad():
        ratio = log_ratio.exp()
        high = (advantage > 0) & (ratio > 1 + clip_high)
        low = (advantage < 0) & (ratio < 1 - clip_low)
        bound = torch.where(high, log_ratio.new_tensor(1 + clip_high), 1 - clip_low)
    is_clipped = high | low
    # The maximum picks the constant bound exactly where `high` or `low` holds. Masking before the
    # exponential keeps an overflowing ratio out of the backward pass, where 0 times inf would be
    # NaN.
    ratio = torch.where(
        is_clipped, bound, torch.where(is_clipped | (advantage == 0), 0.0, log_ratio).exp()
    )
    metrics = {
        "trust/masked_fraction": is_clipped.float().mean(),
        "trust/masked_positive": high.float().mean(),
        "trust/masked_negative": low.float().mean(),
    }
    return -advantage * ratio, metrics


def require_calibration(calibrated_for: str, *, form: str, reduction: str) -> None:
    """Raise UserError where a clip range meets log-probabilities it was not calibrated to.

    `calibrated_for` is the likelihood's form, for means as everything published, or `sum_` and it.
    """
    actual = form if reduction == "mean" else f"sum_{form}"
    if calibrated_for != actual:
        raise UserError(
            f"loss.calibrated_for={calibrated_for}, but likelihood.form={form} and "
            f"likelihood.reduction={reduction}: a clip range calibrated for one kind of "
            "log-probability means another trust region with the other; set "
            f"loss.calibrated_for={actual} together with a range that fits it"
        )


def require_gaussian(form: str, *, loss: str) -> None:
    """Raise UserError where a loss that needs the Gaussian log-density gets another form."""
    if form != "gaussian":
        raise UserError(f"loss={loss} needs likelihood.form=gaussian, not {form}")
