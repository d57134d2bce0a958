"""The ratio of two policies, from the difference of their log-probabilities."""

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
