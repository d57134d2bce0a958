"""Diffusion-NFT: contrast an implicit positive and negative policy on noised samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from flowrl.gaussian import broadcast, mean_square
from flowrl.losses.protocol import ForwardLoss
from flowrl.losses.sums import paired_mean
from flowrl.losses.used import keep_used
from flowrl.types import ForwardInputs, LossOutput
from flowrl.values.bounds import Positive

MIN_WEIGHT = 1e-5
"""Smallest mean absolute error that a sample's loss is divided by."""


@dataclass(kw_only=True)
class NFT(ForwardLoss):
    """Mean over samples of advantage_clip / beta (r |x0_plus - x0|^2 / w_plus + (1 - r) |x0_minus -
    x0|^2 / w_minus).

    v_plus = beta v + (1 - beta) old_v, v_minus = (1 + beta) old_v - beta v, x0_plus and x0_minus =
    x - sigma v_plus and v_minus; squares are means over latent dimensions; w is the detached mean
    absolute error of the sample; r = A / (2 advantage_clip) + 1/2, clamped to [0, 1], the sample's
    optimality. `advantage_clip` scales the loss, so infinity is no way to leave it out.

    Paper: Diffusion-NFT (Zheng et al. 2025, arXiv 2509.16117) and its code, which scales by
    advantage_clip. UniRL's `adv_std_saturate` is the same number under another name, and its
    `ref_deviation_coef` is the weight of `penalty=velocity`. How fast the old policy follows is
    `ForwardLoss.decay`.
    """

    name: ClassVar[str] = "nft"

    beta: Positive
    advantage_clip: Positive

    def __call__(self, inputs: ForwardInputs) -> LossOutput:
        used = keep_used(inputs)
        optimality = (used.advantage / (2 * self.advantage_clip) + 0.5).clamp(0, 1)
        # Unmasked here, so that both estimates hand their gradients on one by one and sums round as
        # in the authors' code: `weighted_error` leaves out samples that are not used.
        velocity = inputs.velocity
        old_velocity = inputs.old_velocity
        positive = self.beta * velocity + (1 - self.beta) * old_velocity
        negative = (1 + self.beta) * old_velocity - self.beta * velocity
        positive_error = weighted_error(used, velocity=positive)
        negative_error = weighted_error(used, velocity=negative)
        errors = optimality * positive_error + (1 - optimality) * negative_error
        scale = self.advantage_clip / self.beta
        return LossOutput(errors.mean() * scale, {})


def weighted_error(inputs: ForwardInputs, *, velocity: Float[Tensor, "B *X"]) -> Float[Tensor, "B"]:
    """Compute the mean squared error of the clean sample that a velocity implies, over its weight.

    The weight is the detached mean absolute error, so that samples count alike whatever their
    scale.
    """
    # x - sigma v estimates x0, since x = (1 - sigma) x0 + sigma eps and v estimates eps - x0.
    error = inputs.x - broadcast(inputs.sigma, inputs.x) * velocity - inputs.x0
    error = torch.where(broadcast(inputs.is_used, error), error, 0.0)
    # The authors' code sums it in float64, which some devices lack.
    weight = paired_mean(error.detach().abs()).clamp(min=MIN_WEIGHT)
    return mean_square(error) / weight
