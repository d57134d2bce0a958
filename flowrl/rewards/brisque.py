"""BRISQUE tells how unnatural an image's local statistics are, without a reference (Mittal et al.
2012; LIVE's C++ release).

Three packages were looked at and left: `piq` and `pyiqa` download their weights, and `brisque`
compiles a C library and fits one image at a time. Its model file ships here as safetensors; where
it comes from, and LIVE's notice, are in `assets/brisque.txt`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, pad

from flowrl.rewards.images import to_tensor
from flowrl.rewards.outputs import finite_valid
from flowrl.rewards.protocol import Images
from flowrl.types import Prompt, RewardOutput

SIDE = 7
SIGMA = 7 / 6
"""Window of the local mean and standard deviation, and its Gaussian."""
NOISE_FLOOR = 1 / 255
FLAT = 1e-9
"""Normalised brightness below this is the rounding of a flat area, whose sign means nothing."""


class BRISQUE:
    """-score / 100, where LIVE's score runs from about 0 (natural) to 100 (distorted); the prompt
    does not matter.

    36 features (18 at full and half size: shapes of the distributions of normalised brightness and
    of the products of neighbours) go through LIVE's support vector regression. An image without any
    texture has no score and is missing. It was made for photographs: in drawings only differences
    mean something. Part: score.
    """

    def __init__(self) -> None:
        file = files("flowrl.rewards").joinpath("assets", "brisque.safetensors")
        self.model = {name: value.double() for name, value in load_file(str(file)).items()}

    part_names = ("score",)

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        score = self.score(to_tensor(images))
        return finite_valid(-score / 100, {"score": score}, ())

    def score(self, images: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B"]:
        """Compute LIVE's score, lower is better; NaN for an image without texture."""
        low = self.model["low"]
        high = self.model["high"]
        scaled = 2 * (features(images) - low) / (high - low) - 1
        distance = torch.cdist(scaled, self.model["vectors"])
        kernel = torch.exp(-self.model["gamma"] * distance.square())
        return (kernel @ self.model["coefficients"] - self.model["rho"]).float()


def features(images: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B 36"]:
    """Compute the features of both scales, float64; NaN where an image has no texture."""
    grey = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64).view(1, 3, 1, 1)
    full = ((images.double() * grey).sum(1, keepdim=True) * 255).round() / 255
    half = interpolate(full, scale_factor=0.5, mode="bicubic", align_corners=False)
    return torch.cat([_statistics(full), _statistics(half)], 1)


def _statistics(grey: Tensor) -> Tensor:
    """Compute the 18 features of one scale from grey images (B 1 H W)."""
    bright = _normalise(grey)[:, 0]
    alpha, left, right = _fit(bright)
    columns = [alpha, (left + right) / 2]
    beside = bright[:, :, :-1] * bright[:, :, 1:]
    below = bright[:, :-1] * bright[:, 1:]
    falling = bright[:, :-1, :-1] * bright[:, 1:, 1:]
    rising = bright[:, 1:, :-1] * bright[:, :-1, 1:]
    for products in (beside, below, falling, rising):
        alpha, left, right = _fit(products)
        gammas = torch.lgamma(2 / alpha) - (torch.lgamma(1 / alpha) + torch.lgamma(3 / alpha)) / 2
        columns += [alpha, (right.sqrt() - left.sqrt()) * gammas.exp(), left, right]
    return torch.stack(columns, 1)


def _normalise(grey: Tensor) -> Tensor:
    """Compute (brightness - local mean) / (local standard deviation + 1/255)."""
    offset = torch.arange(SIDE, dtype=torch.float64) - SIDE // 2
    line = torch.exp(-(offset**2) / (2 * SIGMA**2))
    window = torch.outer(line, line).div(line.sum() ** 2).view(1, 1, SIDE, SIDE)

    def local(values: Tensor) -> Tensor:
        return conv2d(pad(values, [SIDE // 2] * 4, mode="reflect"), window)

    mean = local(grey)
    std = (local(grey**2) - mean**2).abs().sqrt()
    normalised = (grey - mean) / (std + NOISE_FLOOR)
    return torch.where(normalised.abs() < FLAT, 0.0, normalised)


def _fit(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Fit an asymmetric generalised Gaussian by matching moments: shape alpha, and the variances
    left and right of 0.
    """
    flat = values.flatten(1)
    left = _variance_where(flat < 0, flat)
    right = _variance_where(flat > 0, flat)
    ratio = (left / right).sqrt()
    moment = flat.abs().mean(1).square() / flat.square().mean(1)
    target = moment * (ratio**3 + 1) * (ratio + 1) / (ratio**2 + 1).square()
    grid = torch.arange(0.2, 10.0, 0.001, dtype=torch.float64)
    curve = torch.exp(2 * torch.lgamma(2 / grid) - torch.lgamma(1 / grid) - torch.lgamma(3 / grid))
    # The curve rises with alpha, so the nearest entry is one of the two around the target.
    above = torch.searchsorted(curve, target.nan_to_num(0.0)).clamp(1, len(grid) - 1)
    is_nearer_below = target - curve[above - 1] < curve[above] - target
    alpha = grid[above - is_nearer_below.long()]
    return torch.where(target.isnan(), torch.nan, alpha), left, right


def _variance_where(is_side: Tensor, values: Tensor) -> Tensor:
    """Return the mean square of the values on one side of 0; NaN where that side is empty."""
    return torch.where(is_side, values, 0.0).square().sum(1) / is_side.sum(1)
