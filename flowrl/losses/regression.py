"""What flow matching regresses on, and how its error may be weighted by sigma; AWM and Forward DPPO
share both.
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from flowrl.gaussian import broadcast
from flowrl.types import ForwardInputs

POWERS = {"uniform": 0, "sigma": 1, "sigma_squared": 2}
"""The power of sigma that is a weighting's weight, by its name."""


def flow_target(inputs: ForwardInputs) -> Float[Tensor, "B *X"]:
    """Compute eps - x0, the velocity that flow matching regresses on, of each noised sample."""
    # x = (1 - sigma) x0 + sigma eps, so that (x - x0) / sigma = eps - x0.
    return (inputs.x - inputs.x0) / broadcast(inputs.sigma, inputs.x)


def sigma_weight(
    sigma: Float[Tensor, "B"], *, weighting: Literal["uniform", "sigma", "sigma_squared"]
) -> Float[Tensor, "B"]:
    """Compute the weight of each sample: 1, sigma or sigma^2."""
    return sigma ** POWERS[weighting]
