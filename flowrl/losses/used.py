"""Samples that are not used are kept out of a forward loss before anything is computed of them."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from flowrl.gaussian import broadcast, mean_square
from flowrl.types import ForwardInputs


def keep_used(inputs: ForwardInputs) -> ForwardInputs:
    """Return the inputs with zeros in place of the samples that are not used.

    Such a sample has no error and no advantage, and its velocity gets no gradient. Behind a mask of
    the losses alone an infinite one would give 0 times infinity backwards, which is NaN.
    """
    is_used = broadcast(inputs.is_used, inputs.x)
    ref_velocity = inputs.ref_velocity
    if ref_velocity is not None:
        ref_velocity = torch.where(is_used, ref_velocity, 0.0)
    return replace(
        inputs,
        x0=torch.where(is_used, inputs.x0, 0.0),
        x=torch.where(is_used, inputs.x, 0.0),
        velocity=torch.where(is_used, inputs.velocity, 0.0),
        old_velocity=torch.where(is_used, inputs.old_velocity, 0.0),
        ref_velocity=ref_velocity,
        advantage=torch.where(inputs.is_used, inputs.advantage, 0.0),
    )


def velocity_distance(inputs: ForwardInputs) -> Float[Tensor, ""]:
    """Compute mean (v - old_v)^2 over all samples, without a gradient.

    A sample that is not used counts, too, but as 0 where its distance is no finite number.
    """
    moved = (inputs.velocity - inputs.old_velocity).detach()
    is_counted = inputs.is_used | mean_square(moved).isfinite()
    return torch.where(broadcast(is_counted, moved), moved, 0.0).square().mean()
