"""The evidence lower bound of a sample's log-probability, which EPG, PEPG and PAR follow."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from flowrl.losses.nft import weighted_error
from flowrl.types import ForwardInputs


def elbo_and_change(inputs: ForwardInputs) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
    """Compute the bound of each sample noised to sigma, elbo = -mean (x - sigma v - x0)^2 / w over
    latent dimensions, and its change rho = elbo - old_elbo since the old policy.

    w is the detached mean absolute error of the same estimate, so both carry the gradient of the
    squared error alone.

    Source: the `adaptive` estimator of rethinking-diffusion-rl (ICML 2026), which its recipes take.
    Its division by a training guidance, which they leave at 1, and its other estimators are left
    out.
    """
    elbo = -weighted_error(inputs, velocity=inputs.velocity)
    old_elbo = -weighted_error(inputs, velocity=inputs.old_velocity)
    return elbo, elbo - old_elbo
