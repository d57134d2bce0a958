"""BRISQUE: how unnatural an image's local statistics are, without a reference (Mittal et al. 2012;
LIVE's C++ release).

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
        self.model = load_file(
            str(files("flowrl.rewards").joinpath("assets", "brisque.safetensors"))
        )
        self.model = {name: value.double() for name, value in self.model.items()}

    part_names = ("score",)

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        score = self.score(to_tensor(images))
        is_valid = score.isfinite()
        return RewardOutput((-score / 100).masked_fill(~is_valid, 0.0), is_valid, {"score": score})

    def score(self, images: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B"]:
        """LIVE's score, lower is better; NaN for an image without texture."""
        low = self.model["low"]
        high = self.model["high"]
        scaled = 2 * (features(images) - low) / (high - low) - 1
        kernel = torch.exp(
            -self.model["gamma"] * torch.cdist(scaled, self.model["vectors"]).square()
        )
        return (kernel @ self.model["coefficients"] - self.model["rho"]).float()


def features(images: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B 36"]:
    """The features of both scales, float64; NaN where an image has no texture."""
    grey = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64).view(1, 3, 1, 1)
    full = ((images.double() * grey).sum(1, keepdim=True) * 255).round() / 255
    half = interpolate(full, scale_factor=0.5, mode="bicubic", align_corners=False)
    return torch.cat([_statistics(full), _statistics(half)], 1)


def _statistics(grey: Tensor) -> Tensor:
    n = _normalise(grey)[:, 0]
    alpha, left, right = _fit(n)
    columns = [alpha, (left + right) / 2]
    beside = n[:, :, :-1] * n[:, :, 1:]
    below = n[:, :-1] * n[:, 1:]
    falling = n[:, :-1, :-1] * n[:, 1:, 1:]
    rising = n[:, 1:, :-1] * n[:, :-1, 1:]
    for products in (beside, below, falling, rising):
        alpha, left, right = _fit(products)
        gammas = torch.lgamma(2 / alpha) - (torch.lgamma(1 / alpha) + torch.lgamma(3 / alpha)) / 2
        columns += [alpha, (right.sqrt() - left.sqrt()) * gammas.exp(), left, right]
    return torch.stack(columns, 1)


def _normalise(grey: Tensor) -> Tensor:
    """(brightness - local mean) / (local standard deviation + 1/255)."""
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
    """Asymmetric generalised Gaussian by matching moments: shape alpha, and the variances left and
    right of 0.
    """
    flat = values.flatten(1)
    left, right = (
        torch.where(is_side, flat, 0.0).square().sum(1) / is_side.sum(1)
        for is_side in (flat < 0, flat > 0)
    )
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
