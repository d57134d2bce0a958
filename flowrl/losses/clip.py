"""Ratio clipping as in PPO, which Flow-GRPO, Flow-CPS and GRPO-Guard share."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from flowrl.errors import UserError
from flowrl.types import LossInputs


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


def require_positive(*, advantage_clip: float) -> None:
    """Raise UserError unless advantages keep their sign; infinity leaves them unclipped."""
    if not (isinstance(advantage_clip, int | float) and advantage_clip > 0):
        raise UserError(
            f"loss.advantage_clip={advantage_clip} must be a number above 0; for no bound set it "
            "to inf (in YAML .inf)"
        )


def require_range(*, clip_low: float, clip_high: float) -> None:
    """Raise UserError unless the ratio 1 of unchanged weights lies inside the clip range."""
    for name, value in (("clip_low", clip_low), ("clip_high", clip_high)):
        if not value >= 0:
            raise UserError(
                f"loss.{name}={value} must not be negative: the range would leave out ratio 1"
            )


def require_calibration(inputs: LossInputs, *, calibrated_for: str) -> None:
    """Raise UserError where a clip range meets other log-probabilities than those it was calibrated
    to.

    `calibrated_for` is `gaussian` or `unnormalised`, mean-reduced as everything published, or
    `sum_` and one of them.
    """
    if calibrated_for.removeprefix("sum_") not in ("gaussian", "unnormalised"):
        raise UserError(
            f"loss.calibrated_for={calibrated_for!r} must be gaussian or unnormalised, or sum_ and "
            "one of them"
        )
    actual = inputs.form if inputs.reduction == "mean" else f"sum_{inputs.form}"
    if calibrated_for != actual:
        raise UserError(
            f"loss.calibrated_for={calibrated_for}, but likelihood.form={inputs.form} and "
            "likelihood.reduction="
            f"{inputs.reduction}: a clip range calibrated for one kind of log-probability means "
            "another trust region "
            f"with the other; set loss.calibrated_for={actual} together with a range that fits it"
        )


def require_gaussian(inputs: LossInputs, *, loss: str) -> None:
    """Raise UserError where a loss that needs the Gaussian log-density gets another form."""
    if inputs.form != "gaussian":
        raise UserError(f"loss={loss} needs likelihood.form=gaussian, not {inputs.form}")
