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

    Source: the study of objectives and estimators published as rethinking-diffusion-rl (ICML 2026),
    its EPG, PEPG and PAR with its `adaptive` estimator, as its recipes take them. These have
    advantages A = 0.1 (r - mean_g), not divided by a standard deviation and not clipped. Left out
    are its division by a training guidance, which they leave at 1, its other estimators, and the
    variants without exp(rho).
    """
    elbo = -weighted_error(inputs, velocity=inputs.velocity)
    old_elbo = -weighted_error(inputs, velocity=inputs.old_velocity)
    return elbo, elbo - old_elbo
