"""Diffusion-NFT: contrast an implicit positive and negative policy on the forward process; no likelihoods."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from flowrl.types import ForwardInputs, LossOutput

MIN_WEIGHT = 1e-5
"""Smallest mean absolute error that a sample's loss is divided by."""


def nft(inputs: ForwardInputs, *, beta: float, advantage_clip: float) -> LossOutput:
    """Mean over samples of advantage_clip / beta (r |x0_plus - x0|^2 / w_plus + (1 - r) |x0_minus - x0|^2 / w_minus).

    v_plus = beta v + (1 - beta) old_v, v_minus = (1 + beta) old_v - beta v, x0_plus and x0_minus = x - sigma v_plus and
    v_minus; squares are means over latent dimensions; w is the detached mean absolute error of the
    sample; r = A / (2 advantage_clip) + 1/2, clamped to [0, 1], the sample's optimality.

    Paper: Diffusion-NFT (Zheng et al. 2025, arXiv 2509.16117) and its code, which scales by advantage_clip.
    """
    if not beta > 0:
        raise ValueError(f"loss.beta={beta} must be positive")
    optimality = (inputs.advantage / (2 * advantage_clip) + 0.5).clamp(0, 1)
    positive = beta * inputs.velocity + (1 - beta) * inputs.old_velocity
    negative = (1 + beta) * inputs.old_velocity - beta * inputs.velocity
    errors = optimality * _error(inputs, positive) + (1 - optimality) * _error(inputs, negative)
    distance = (inputs.velocity - inputs.old_velocity).detach().square().mean()
    return LossOutput(errors.mean() * (advantage_clip / beta), {"trust/velocity_old": distance})


def _error(inputs: ForwardInputs, velocity: Float[Tensor, "B C H W"]) -> Float[Tensor, "B"]:
    error = inputs.x - inputs.sigma.view(-1, 1, 1, 1) * velocity - inputs.x0
    weight = error.detach().double().abs().mean((1, 2, 3)).clamp(min=MIN_WEIGHT).to(error)
    return error.square().mean((1, 2, 3)) / weight
