"""Diffusion-NFT: contrast an implicit positive and negative policy on the forward process; no
likelihoods.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flowrl.errors import UserError
from flowrl.types import ForwardInputs, LossOutput
from flowrl.values.bounds import Natural, NonNegative, Positive, Share

MIN_WEIGHT = 1e-5
"""Smallest mean absolute error that a sample's loss is divided by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NFT:
    """Mean over samples of advantage_clip / beta (r |x0_plus - x0|^2 / w_plus + (1 - r) |x0_minus -
    x0|^2 / w_minus).

    v_plus = beta v + (1 - beta) old_v, v_minus = (1 + beta) old_v - beta v, x0_plus and x0_minus =
    x - sigma v_plus and v_minus; squares are means over latent dimensions; w is the detached mean
    absolute error of the sample; r = A / (2 advantage_clip) + 1/2, clamped to [0, 1], the sample's
    optimality.

    Rollouts are deterministic and drawn by the old policy, which follows the current one: after an
    iteration it becomes d old + (1 - d) current, with d = min(decay_rate max(n - decay_start, 0),
    decay_limit) after n optimizer steps. Each sample trains on a `fraction` of the grid's sigmas,
    at least one, picked at random.

    Paper: Diffusion-NFT (Zheng et al. 2025, arXiv 2509.16117) and its code, which scales by
    advantage_clip.
    """

    beta: Positive
    advantage_clip: Positive
    fraction: Share
    decay_rate: NonNegative
    decay_start: Natural
    decay_limit: Share

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise UserError(f"loss.beta={self.beta} must be positive")
        # It scales the loss, so infinity is no way to leave it out.
        if not 0 < self.advantage_clip < math.inf:
            raise UserError(f"loss.advantage_clip={self.advantage_clip} must be above 0 and finite")
        for name in ("decay_rate", "decay_start"):
            if not getattr(self, name) >= 0:
                raise UserError(f"loss.{name}={getattr(self, name)} must not be negative")
        for name in ("fraction", "decay_limit"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"loss.{name}={getattr(self, name)} must be in [0, 1]")

    def __call__(self, inputs: ForwardInputs) -> LossOutput:
        optimality = (inputs.advantage / (2 * self.advantage_clip) + 0.5).clamp(0, 1)
        positive = self.beta * inputs.velocity + (1 - self.beta) * inputs.old_velocity
        negative = (1 + self.beta) * inputs.old_velocity - self.beta * inputs.velocity
        errors = optimality * _error(inputs, velocity=positive) + (1 - optimality) * _error(
            inputs, velocity=negative
        )
        errors = torch.where(inputs.is_used, errors, 0.0)
        distance = (inputs.velocity - inputs.old_velocity).detach().square().mean()
        return LossOutput(
            errors.mean() * (self.advantage_clip / self.beta), {"trust/velocity_old": distance}
        )

    def decay(self, num_optimizer_steps: int) -> float:
        """d, the weight that the old policy keeps."""
        return min(
            self.decay_rate * max(num_optimizer_steps - self.decay_start, 0), self.decay_limit
        )

    def num_sigmas(self, num_steps: int) -> int:
        """How many of the grid's sigmas a sample trains on, at least one."""
        return max(1, int(num_steps * self.fraction))


def _error(inputs: ForwardInputs, *, velocity: Float[Tensor, "B C H W"]) -> Float[Tensor, "B"]:
    error = inputs.x - inputs.sigma.view(-1, 1, 1, 1) * velocity - inputs.x0
    weight = error.detach().double().abs().mean((1, 2, 3)).clamp(min=MIN_WEIGHT).to(error)
    return error.square().mean((1, 2, 3)) / weight
