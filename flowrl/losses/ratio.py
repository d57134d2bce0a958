"""The ratio of two policies, from the difference of their log-probabilities, and which samples move
away from the old one.
"""

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
    return (advantage > 0) & (log_ratio.exp() > 1)


def moves_down(
    advantage: Float[Tensor, "B"], *, log_ratio: Float[Tensor, "B"]
) -> Bool[Tensor, "B"]:
    """Tell which samples have become less likely and would become even less so: A < 0 and r < 1."""
    return (advantage < 0) & (log_ratio.exp() < 1)


def masked_shares(
    *, positive: Bool[Tensor, "B"], negative: Bool[Tensor, "B"]
) -> dict[str, Float[Tensor, ""]]:
    """Return the metrics of a clip or a mask: the shares of samples whose gradient it removes, in
    all, and among positive and negative advantages.
    """
    return {
        "trust/masked_fraction": (positive | negative).float().mean(),
        "trust/masked_positive": positive.float().mean(),
        "trust/masked_negative": negative.float().mean(),
    }
