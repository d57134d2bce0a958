"""One sampling step is a Gaussian: drawing, log-probability and divergences exist once, here.

This is the only place where the configured reduction over latent dimensions is applied. All
arithmetic is in the dtype of `mean`, float32 in training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from flowrl.errors import UserError
from flowrl.types import LogProbForm, Reduction
from flowrl.values.check import check_fields


@dataclass(frozen=True, slots=True)
class GaussianStep:
    """The distribution N(mean, std^2 I) of `x_next` given `x`; `std` is that of the whole step, 0
    for an ODE step.
    """

    mean: Float[Tensor, "B *X"]
    std: float

    def sample(self, noise: Float[Tensor, "B *X"]) -> Float[Tensor, "B *X"]:
        """Return mean + std noise."""
        return self.mean + self.std * noise


@dataclass(frozen=True, slots=True, kw_only=True)
class Likelihood:
    """The way in which log-probabilities and divergences of a step are reduced over its D latent
    dimensions.

    `reduction`: `mean` is what every published clip range and threshold is calibrated to; `sum` is
    the true likelihood. `form`: `gaussian` is the log-density; `unnormalised` is `-(x_next -
    mean)^2`, what Flow-CPS published, whose clip ranges do not carry over to other samplers.
    """

    reduction: Reduction
    form: LogProbForm

    def __post_init__(self) -> None:
        check_fields(self, "likelihood")

    def log_prob(self, step: GaussianStep, x_next: Float[Tensor, "B *X"]) -> Float[Tensor, "B"]:
        """Return the log-density of `x_next`, or -(x_next - mean)^2 with `unnormalised`, reduced.

        `x_next` was drawn, so the gradient through it is left out here. Raises UserError for the
        density of a step without noise.
        """
        squared = (x_next.detach() - step.mean).square()
        if self.form == "unnormalised":
            return self._reduce(-squared)
        _require_noise(step)
        # log N of one dimension: -(x - mean)^2 / (2 std^2) - log std - log(2 pi) / 2.
        constant = math.log(step.std) + 0.5 * math.log(2 * math.pi)
        return self._reduce(-squared / (2 * step.std**2) - constant)

    def kl(self, step: GaussianStep, other_mean: Float[Tensor, "B *X"]) -> Float[Tensor, "B"]:
        """Return the KL between two steps of equal std, |mean - other_mean|^2 / (2 std^2), reduced;
        symmetric and exact.

        Flow-DPPO (arXiv 2606.11025), the divergence of its mask. `std` is the whole step's: a
        diffusion coefficient without sqrt(-dt), or Flow-SDE's std under another sampler, is a
        published mistake. Raises UserError for a step without noise.
        """
        _require_noise(step)
        return self._reduce((step.mean - other_mean).square()) / (2 * step.std**2)

    def _reduce(self, values: Float[Tensor, "B *X"]) -> Float[Tensor, "B"]:
        axes = latent_axes(values)
        return values.mean(axes) if self.reduction == "mean" else values.sum(axes)


def latent_axes(values: Float[Tensor, "B *X"]) -> tuple[int, ...]:
    """Return every axis but the batch's, of which latents have one or more."""
    assert values.ndim > 1
    return tuple(range(1, values.ndim))


def broadcast(
    numbers: Shaped[Tensor, "B"], latents: Shaped[Tensor, "B *X"]
) -> Shaped[Tensor, "B ..."]:
    """Return one number a sample in the shape that is combined with latents of any rank."""
    return numbers.view(-1, *[1] * (latents.ndim - 1))


MEAN_KL = Likelihood(reduction="mean", form="gaussian")
"""The likelihood whose `kl` is the mean over dimensions, whatever a run configures."""


def mean_square(values: Float[Tensor, "B *X"]) -> Float[Tensor, "B"]:
    """Return the mean of the squares over latent dimensions."""
    return values.square().mean(latent_axes(values))


def velocity_change(
    step: GaussianStep, other_mean: Float[Tensor, "B *X"], gain: float
) -> Float[Tensor, "B"]:
    """Return mean (v - other_v)^2 of the velocities that gave two means at one state; `gain` is the
    sampler's d mean / d velocity.
    """
    # Both means belong to one state, so they differ by their velocities times the gain.
    return mean_square((step.mean - other_mean) / gain)


def tv(step: GaussianStep, other_mean: Float[Tensor, "B *X"]) -> Float[Tensor, "B"]:
    """Return the total variation between two steps of equal std, 2 Phi(|mean - other_mean| / (2
    std)) - 1, exact.

    It is that of the full Gaussian over all D dimensions, so no reduction applies. Raises UserError
    for a step without noise.
    """
    _require_noise(step)
    # 2 Phi(z) - 1 = erf(z / sqrt 2), with z = distance / (2 std).
    squared = (step.mean - other_mean).square()
    distance = squared.sum(latent_axes(squared)).sqrt()
    return torch.erf(distance / (2 * math.sqrt(2) * step.std))


def _require_noise(step: GaussianStep) -> None:
    if not step.std > 0:
        raise UserError(
            f"a step with std={step.std} has no density: ODE and zero-variance steps are never "
            "trained on"
        )
