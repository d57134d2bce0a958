"""Scores whose differences explain votes: Bradley and Terry's model, linear in an image's features.

A picture of features f has the score s = a f + b, and is preferred to another one with probability
sigmoid(s - s') (Bradley and Terry 1952, Biometrika 39; with features of the compared as in logistic
regression). A vote for neither counts as half a vote for each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

MAX_STEPS = 100
"""Newton's steps, of which a few suffice: the objective is strictly convex."""
TOLERANCE = 1e-10
"""Largest entry of the gradient at which the fit ends."""


@dataclass(frozen=True)
class Fit:
    """The score a f + b of features f, in log-odds, and the share of the votes for one of the two
    that it agrees with, NaN where there are none.
    """

    slope: Float[Tensor, "D"]
    offset: float
    agreement: float

    def scores(self, features: Float[Tensor, "B D"]) -> Float[Tensor, "B"]:
        """Return the scores of images by their features, float32 on the CPU."""
        return (features.detach().cpu().double() @ self.slope + self.offset).float()


def fit_scores(
    left: Float[Tensor, "N D"],
    right: Float[Tensor, "N D"],
    preference: Float[Tensor, "N"],
    *,
    prior_std: float,
    num_first: int,
) -> Fit:
    """Fit scores to N votes on pictures of these features; `preference` is 1 for the left one, 0
    for the right one and .5 for neither.

    The slope maximises the posterior under a Gaussian prior that gives a picture's score the
    standard deviation `prior_std`, in log-odds, whatever the number of features and their scales:
    features are divided by sqrt(D) times their standard deviation over the pictures voted on, and
    weights w of these have the penalty |w|^2 / (2 prior_std^2). The mean score of the pictures of
    the first `num_first` votes is 0.
    """
    left = left.detach().cpu().double()
    right = right.detach().cpu().double()
    preference = preference.double()
    pictures = torch.cat([left, right])
    spread = pictures.std(0, correction=0)
    # A feature that is alike in all pictures explains nothing, and gets no weight.
    is_alike = spread <= 1e-12 * pictures.abs().amax(0).clamp_min(1e-12)
    scale = torch.where(is_alike, torch.inf, spread) * left.shape[1] ** 0.5
    weights = _maximise_posterior((left - right) / scale, preference, prior_std)
    slope = weights / scale
    beginning = torch.cat([left[:num_first], right[:num_first]]).mean(0)
    is_decided = preference != 0.5
    is_left = (left - right) @ slope > 0
    agreement = (is_left == (preference > 0.5))[is_decided].double().mean()
    return Fit(slope, -float(beginning @ slope), float(agreement))


def _maximise_posterior(
    differences: Float[Tensor, "N D"], preference: Float[Tensor, "N"], prior_std: float
) -> Float[Tensor, "D"]:
    """Minimise sum softplus(d w) - preference d w + |w|^2 / (2 prior_std^2) by Newton's steps, each
    halved until the objective falls.
    """
    precision = prior_std**-2
    identity = torch.eye(differences.shape[1], dtype=torch.float64)

    def objective(weights: Tensor) -> Tensor:
        logits = differences @ weights
        losses = softplus(logits) - preference * logits
        return losses.sum() + precision / 2 * weights.square().sum()

    weights = differences.new_zeros(differences.shape[1])
    for _ in range(MAX_STEPS):
        chance = (differences @ weights).sigmoid()
        gradient = differences.T @ (chance - preference) + precision * weights
        if gradient.abs().max() <= TOLERANCE:
            break
        curvature = differences.T @ (differences * (chance * (1 - chance))[:, None])
        step = torch.linalg.solve(curvature + precision * identity, gradient)
        size = 1.0
        # A step that is this small changes nothing in float64.
        while size > 1e-12 and objective(weights - size * step) > objective(weights):
            size /= 2
        weights = weights - size * step
    return weights
