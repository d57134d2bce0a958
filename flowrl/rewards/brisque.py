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

    36 features go through LIVE's support vector regression: 18 at full and 18 at half size, which
    are shapes of the distributions of normalised brightness and of the products of neighbours. An
    image without any texture has no score and is missing.

    It was made for photographs: in drawings only differences mean something.

    Part: score.
    """

    def __init__(self) -> None:
        file = files("flowrl.rewards").joinpath("assets", "brisque.safetensors")
        weights = load_file(str(file))
        self.model = {name: value.double() for name, value in weights.items()}

    part_names = ("score",)

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        score = self.score(to_tensor(images))
        return finite_valid(-score / 100, {"score": score}, ())

    def score(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B"]:
        """Compute LIVE's score, lower is better; NaN for an image without texture."""
        low = self.model["low"]
        high = self.model["high"]
        # The regression was fitted on features scaled to [-1, 1] by the ranges of its training set.
        scaled = 2 * (features(images) - low) / (high - low) - 1
        # libsvm's decision function with its RBF kernel, [B, number of support vectors].
        distance = torch.cdist(scaled, self.model["vectors"])
        kernel = torch.exp(-self.model["gamma"] * distance.square())
        score = kernel @ self.model["coefficients"] - self.model["rho"]
        return score.float()


def features(images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 36"]:
    """Compute the features of both scales, float64; NaN where an image has no texture.

    The first 18 columns are those of the full size, the others those of the half size.
    """
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    grey = (images.double() * weights.view(1, 3, 1, 1)).sum(1, keepdim=True)
    # The published model was fitted on grey images of 8 bits.
    full = (grey * 255).round() / 255
    half = interpolate(full, scale_factor=0.5, mode="bicubic", align_corners=False)
    return torch.cat([_statistics(full), _statistics(half)], 1)


def _statistics(grey: Tensor) -> Tensor:
    """Compute the 18 features of one scale from grey images (B 1 H W): two of the normalised
    brightness, and four of the products of neighbours in each of four directions.
    """
    bright = _normalise(grey)[:, 0]  # [B, H, W]
    alpha, left, right = _fit(bright)
    columns = [alpha, (left + right) / 2]
    # A pixel times its neighbour: right, below, below right and below left.
    beside = bright[:, :, :-1] * bright[:, :, 1:]
    below = bright[:, :-1] * bright[:, 1:]
    falling = bright[:, :-1, :-1] * bright[:, 1:, 1:]
    rising = bright[:, 1:, :-1] * bright[:, :-1, 1:]
    directions = (beside, below, falling, rising)
    for products in directions:
        alpha, left, right = _fit(products)
        # The mean of the fitted distribution, the paper's eta:
        # (std_right - std_left) Gamma(2/alpha) / sqrt(Gamma(1/alpha) Gamma(3/alpha)).
        log_root = (torch.lgamma(1 / alpha) + torch.lgamma(3 / alpha)) / 2
        log_ratio = torch.lgamma(2 / alpha) - log_root
        eta = (right.sqrt() - left.sqrt()) * log_ratio.exp()
        columns += [alpha, eta, left, right]
    return torch.stack(columns, 1)


def _normalise(grey: Tensor) -> Tensor:
    """Compute (brightness - local mean) / (local standard deviation + 1/255), equation 1 of the
    paper, whose constant 1 belongs to brightness up to 255.
    """
    # The window is a Gaussian in both directions, whose weights add up to 1.
    offset = torch.arange(SIDE, dtype=torch.float64) - SIDE // 2
    line = torch.exp(-(offset**2) / (2 * SIGMA**2))
    window = torch.outer(line, line).div(line.sum() ** 2)
    kernel = window.view(1, 1, SIDE, SIDE)

    def local(values: Tensor) -> Tensor:
        """Return the mean around each pixel; at the edges the image is mirrored."""
        margins = [SIDE // 2] * 4
        return conv2d(pad(values, margins, mode="reflect"), kernel)

    mean = local(grey)
    # Rounding may leave a variance just below 0, hence abs.
    variance = (local(grey**2) - mean**2).abs()
    std = variance.sqrt()
    normalised = (grey - mean) / (std + NOISE_FLOOR)
    return torch.where(normalised.abs() < FLAT, 0.0, normalised)


def _fit(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Fit an asymmetric generalised Gaussian by matching moments: shape alpha, and the variances
    left and right of 0, each of shape (B,).

    Alpha solves Gamma(2/alpha)^2 / (Gamma(1/alpha) Gamma(3/alpha)) = r (g^3 + 1) (g + 1) /
    (g^2 + 1)^2, with r = mean(|x|)^2 / mean(x^2) and g the ratio of the two standard deviations. It
    is looked up in LIVE's table, from 0.2 to 10 in steps of 0.001.
    """
    flat = values.flatten(1)
    left = _variance_where(flat < 0, flat)
    right = _variance_where(flat > 0, flat)
    ratio = (left / right).sqrt()
    moment = flat.abs().mean(1).square() / flat.square().mean(1)
    # The factor is 1 where both sides are alike, as in a symmetric distribution.
    target = moment * (ratio**3 + 1) * (ratio + 1) / (ratio**2 + 1).square()
    grid = torch.arange(0.2, 10.0, 0.001, dtype=torch.float64)
    log_curve = 2 * torch.lgamma(2 / grid) - torch.lgamma(1 / grid) - torch.lgamma(3 / grid)
    curve = torch.exp(log_curve)
    # The curve rises with alpha, so the nearest entry is one of the two around the target.
    above = torch.searchsorted(curve, target.nan_to_num(0.0)).clamp(1, len(grid) - 1)
    is_nearer_below = target - curve[above - 1] < curve[above] - target
    nearest = above - is_nearer_below.long()
    alpha = grid[nearest]
    return torch.where(target.isnan(), torch.nan, alpha), left, right


def _variance_where(is_side: Tensor, values: Tensor) -> Tensor:
    """Return the mean square of the values on one side of 0; NaN where that side is empty."""
    total = torch.where(is_side, values, 0.0).square().sum(1)
    count = is_side.sum(1)  # 0 / 0 gives the NaN
    return total / count
