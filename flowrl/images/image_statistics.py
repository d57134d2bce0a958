"""The hacking panel measures what images look like, whatever any reward says of them.

Rewards that are cheated leave traces here first: edges and colours vanish, pictures grow darker or
lighter, grids and noise appear. Each number is compared with the base model's own images, not with
an ideal.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import conv2d, pad

EDGE = 0.1
"""Gradient of brightness, per pixel, above which a pixel belongs to an edge."""
LEVELS = 4
"""Levels of each colour channel in the histogram of colours: 64 bins, 6 bits at most."""
HIGH = 0.25
"""Cycles per pixel above which energy counts as high-frequency: half of the highest."""

MEANINGS = {
    "edge_density": "share of pixels on an edge (gradient of brightness above 0.1 per pixel)",
    "colour_entropy": "entropy of the 64-colour histogram, in bits",
    "brightness": "mean brightness",
    "high_frequency": (
        "share of the brightness's energy, mean removed, above a quarter cycle per pixel"
    ),
}


def panel(images: Float[Tensor, "B 3 S S"]) -> dict[str, Float[Tensor, "B"]]:
    """Compute the four numbers of each image in [0, 1], named as in `MEANINGS`; NaN where a pixel
    is no number.
    """
    images = images.float()
    is_whole = images.isfinite().flatten(1).all(1)
    images = images.where(is_whole[:, None, None, None], 0.0)
    grey = (images * images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1)
    looks = {
        "edge_density": _edge_density(grey),
        "colour_entropy": _colour_entropy(images),
        "brightness": grey.mean((1, 2)),
        "high_frequency": _high_frequency(grey),
    }
    return {name: values.where(is_whole, torch.nan) for name, values in looks.items()}


def _edge_density(grey: Tensor) -> Tensor:
    """Compute the share of pixels on an edge by Sobel's operator, scaled so that a ramp of 0.1 per
    pixel has gradient 0.1.
    """
    sobel = grey.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
    kernels = torch.stack([sobel, sobel.T])[:, None]
    across, down = conv2d(pad(grey[:, None], [1] * 4, mode="replicate"), kernels).unbind(1)
    return (across.square() + down.square()).sqrt().gt(EDGE).float().mean((1, 2))


def _colour_entropy(images: Tensor) -> Tensor:
    """Compute the entropy of each image's colours in bits."""
    level = (images * LEVELS).long().clamp(0, LEVELS - 1)
    colour = (level[:, 0] * LEVELS + level[:, 1]) * LEVELS + level[:, 2]
    bins = torch.arange(len(images), device=images.device).view(-1, 1, 1) * LEVELS**3 + colour
    counts = bins.flatten().bincount(minlength=len(images) * LEVELS**3).view(len(images), -1)
    shares = counts / counts.sum(1, keepdim=True)
    return -(shares * shares.clamp(min=1e-12).log2()).sum(1)


def _high_frequency(grey: Tensor) -> Tensor:
    """Compute the share of energy at high frequencies, 0 for an image of one brightness."""
    centred = grey - grey.mean((1, 2), keepdim=True)
    energy = torch.fft.fft2(centred).abs().square()
    down, across = (torch.fft.fftfreq(size, device=grey.device) for size in grey.shape[1:])
    is_high = torch.hypot(down[:, None], across[None, :]) > HIGH
    total = energy.sum((1, 2))
    is_flat = centred.abs().amax((1, 2)) < 1e-6
    return torch.where(is_flat, 0.0, (energy * is_high).sum((1, 2)) / total.clamp(min=1e-12))
