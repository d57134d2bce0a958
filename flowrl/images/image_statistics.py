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
LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the brightness (ITU-R BT.601, as in JPEG)."""

MEANINGS = {
    "edge_density": "share of pixels on an edge (gradient of brightness above 0.1 per pixel)",
    "colour_entropy": "entropy of the 64-colour histogram, in bits",
    "brightness": "mean brightness",
    "high_frequency": (
        "share of the brightness's energy, mean removed, above a quarter cycle per pixel"
    ),
}


def panel(images: Float[Tensor, "B 3 H W"]) -> dict[str, Float[Tensor, "B"]]:
    """Compute the four numbers of each image in [0, 1], named as in `MEANINGS`; NaN where a pixel
    is no number.

    Images of any floating dtype are measured in float32, each on its own.
    """
    images = images.float()
    is_whole = images.isfinite().flatten(1).all(1)
    # A broken image is measured as black, since the histogram cannot count a NaN.
    images = images.where(is_whole[:, None, None, None], 0.0)
    weights = images.new_tensor(LUMA).view(1, 3, 1, 1)
    grey = (images * weights).sum(1)  # [B, H, W]
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
    kernels = torch.stack([sobel, sobel.T])[:, None]  # [2, 1, 3, 3]
    # Padding by zeros would draw an edge around every image.
    padded = pad(grey[:, None], [1] * 4, mode="replicate")
    across, down = conv2d(padded, kernels).unbind(1)
    gradient = (across.square() + down.square()).sqrt()
    is_edge = gradient > EDGE
    return is_edge.float().mean((1, 2))


def _colour_entropy(images: Tensor) -> Tensor:
    """Compute the entropy of each image's colours in bits, -sum p log2 p over the histogram."""
    num_images = len(images)
    num_colours = LEVELS**3
    # The clamp puts a channel of exactly 1 into the highest level.
    level = (images * LEVELS).long().clamp(0, LEVELS - 1)
    red, green, blue = level.unbind(1)
    colour = (red * LEVELS + green) * LEVELS + blue
    # One histogram counts all images: the bins of each follow those of the one before.
    first_bin = torch.arange(num_images, device=images.device) * num_colours
    bins = first_bin.view(-1, 1, 1) + colour
    counts = bins.flatten().bincount(minlength=num_images * num_colours)
    counts = counts.view(num_images, num_colours)
    shares = counts / counts.sum(1, keepdim=True)
    # p log2 p is 0 where p is: the clamp keeps the logarithm finite there.
    logs = shares.clamp(min=1e-12).log2()
    return -(shares * logs).sum(1)


def _high_frequency(grey: Tensor) -> Tensor:
    """Compute the share of energy at high frequencies, 0 for an image of one brightness."""
    centred = grey - grey.mean((1, 2), keepdim=True)
    energy = torch.fft.fft2(centred).abs().square()  # [B, H, W], one number a frequency
    num_rows, num_columns = grey.shape[1:]
    down = torch.fft.fftfreq(num_rows, device=grey.device)
    across = torch.fft.fftfreq(num_columns, device=grey.device)
    is_high = torch.hypot(down[:, None], across[None, :]) > HIGH
    high = (energy * is_high).sum((1, 2))
    total = energy.sum((1, 2))
    # Of one brightness, only rounding is left of the energy, and its share means nothing.
    is_flat = centred.abs().amax((1, 2)) < 1e-6
    return torch.where(is_flat, 0.0, high / total.clamp(min=1e-12))
