"""Means in more than the digits of one float, on devices that have no float64."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def paired_mean(values: Float[Tensor, "B *X"]) -> Float[Tensor, "B"]:
    """Return the mean over all axes but the batch's, summed in pairs of floats.

    Each sum of two numbers is kept with its rounding error (Knuth's TwoSum, The Art of Computer
    Programming, volume 2, section 4.2.2), so that in float32 the sum has about 48 bits: after its
    rounding to float32 it is the one that float64 gives, whatever the order, and a sum of D float32
    numbers alone is not.
    """
    total = values.flatten(1)
    error = torch.zeros_like(total)
    while total.shape[1] > 1:
        if total.shape[1] % 2:
            total = torch.cat([total, torch.zeros_like(total[:, :1])], 1)
            error = torch.cat([error, torch.zeros_like(error[:, :1])], 1)
        left, right = total.chunk(2, 1)
        total = left + right
        # What the sum holds of the right part, and what it lost of both.
        taken = total - left
        lost = (left - (total - taken)) + (right - taken)
        left_error, right_error = error.chunk(2, 1)
        error = left_error + right_error + lost
    return (total + error).squeeze(1) / values[0].numel()
