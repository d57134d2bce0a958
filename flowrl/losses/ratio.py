"""The ratio of two policies, from its logarithm, and which samples move away from the old one."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def safe_ratio(
    log_ratio: Float[Tensor, "B"], *, is_ignored: Bool[Tensor, "B"]
) -> Float[Tensor, "B"]:
    """Return exp(log_ratio), and 1 without a gradient for samples whose ratio is ignored.

    Those are masked before the exponential: behind a `where` alone, a ratio that overflows to
    infinity would still give 0 times infinity, which is NaN, in the backward pass.
    """
    return torch.where(is_ignored, 0.0, log_ratio).exp()


def moves_up(advantage: Float[Tensor, "B"], *, log_ratio: Float[Tensor, "B"]) -> Bool[Tensor, "B"]:
    """Tell which samples have become likelier and would become likelier still: A > 0 and r > 1."""
    # The sign of the logarithm: in float32 an exponential within 6e-8 of 1 is 1.
    return (advantage > 0) & (log_ratio > 0)


def moves_down(
    advantage: Float[Tensor, "B"], *, log_ratio: Float[Tensor, "B"]
) -> Bool[Tensor, "B"]:
    """Tell which samples have become less likely and would become even less so: A < 0 and r < 1."""
    return (advantage < 0) & (log_ratio < 0)


def masked_shares(
    *, positive: Bool[Tensor, "B"], negative: Bool[Tensor, "B"]
) -> dict[str, Float[Tensor, ""]]:
    """Return the metrics of a clip or a mask: which share of all samples loses its gradient to it,
    and which of these have a positive and a negative advantage, as shares of all samples too.
    """
    return {
        "trust/masked_fraction": (positive | negative).float().mean(),
        "trust/masked_positive": positive.float().mean(),
        "trust/masked_negative": negative.float().mean(),
    }
