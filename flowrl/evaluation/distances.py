"""Distances between two sets of images: the Fréchet and the kernel distance on the features of a
named network.

With Inception's weights at hand (torch-fidelity's file) they are FID and KID. Without them the same
distances are taken on `random-conv-128`, a small network of fixed random weights: they then tell
sets apart by colour and texture, rank runs that are compared with each other, and must not be
compared with published FID or KID.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate

from flowrl.errors import UserError

Features = Callable[[Float[Tensor, "B 3 H W"]], Float[Tensor, "B D"]]

SIDE = 64
CHANNELS = (32, 64, 64)
SEED = 0
"""`random-conv-128` resizes images to this side, has layers of these channels, and draws its
weights from this seed.
"""
SUBSETS = 100
SUBSET_SIZE = 1000
"""KID (arXiv 1801.01401, and torch-fidelity) draws so many subsets of so many images, or of all if
there are fewer.
"""


class RandomConv(nn.Module):
    """Three strided convolutions with He-scaled random weights; mean and spread of the last one's
    64 channels.
    """

    name = "random-conv-128"

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(SEED)
        layers: list[nn.Module] = []
        for inside, outside in zip((3, *CHANNELS), CHANNELS, strict=False):
            layer = nn.Conv2d(inside, outside, 3, stride=2, padding=1, bias=False)
            layer.requires_grad_(False)
            normal = torch.randn(layer.weight.shape, generator=generator)
            layer.weight.copy_(normal * (2 / (9 * inside)) ** 0.5)
            layers += [layer, nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """Compute 128 features an image, float64."""
        size = (SIDE, SIDE)
        small = interpolate(
            images.float() * 2 - 1, size, mode="bilinear", antialias=True, align_corners=False
        )
        maps = self.layers(small).flatten(2).double()
        return torch.cat([maps.mean(2), maps.std(2)], 1)


class Inception:
    """The 2048 features of torch-fidelity's InceptionV3, from its weights file; needs the extra
    `fid`.
    """

    name = "inception-v3-2048"

    def __init__(self, weights: str) -> None:
        if not Path(weights).is_file():
            raise UserError(
                f"--inception {weights}: no such file; give torch-fidelity's "
                "pt_inception-2015-12-05 weights"
            )
        try:
            module = import_module("torch_fidelity.feature_extractor_inceptionv3")
        except ModuleNotFoundError as error:
            raise UserError(
                f"--inception needs {error.name!r}; install it with: pip install "
                "'flowrl-lightning[fid]'"
            ) from error
        self.network = module.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=weights
        )

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """Compute features of images in 8 bits, which the network resizes itself, as published
        scores are taken.
        """
        return self.network((images.clamp(0, 1) * 255).round().byte())[0].double()


def frechet(a: Float[Tensor, "N D"], b: Float[Tensor, "M D"]) -> float:
    """Return |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)) of two sets' features
    (arXiv 1706.08500).
    """
    mean_a = a.double().mean(0)
    mean_b = b.double().mean(0)
    cov_a = torch.cov(a.double().T)
    cov_b = torch.cov(b.double().T)
    # tr (cov_a cov_b)^(1/2) is the sum of the singular values of cov_a^(1/2) cov_b^(1/2).
    root = torch.linalg.svdvals(_root(cov_a) @ _root(cov_b)).sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root)


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def kernel(a: Float[Tensor, "N D"], b: Float[Tensor, "M D"], *, is_paired: bool) -> float:
    """Return the unbiased squared MMD with the kernel (x.y / D + 1)^3, mean over random subsets;
    may fall below 0.

    Where row i of both sets is the same prompt drawn from the same noise, `is_paired` leaves pairs
    (i, i) out of the cross term: they are alike beyond what the two distributions are. Raises
    UserError below two images.
    """
    size = min(SUBSET_SIZE, len(a), len(b))
    if size < 2:
        raise UserError(
            f"the kernel distance of {len(a)} and {len(b)} images: it needs at least 2 of each"
        )
    if is_paired and len(a) != len(b):
        raise UserError(f"the kernel distance of pairs: {len(a)} and {len(b)} images are no pairs")
    generator = torch.Generator().manual_seed(0)
    distances = []
    for _ in range(SUBSETS if size < max(len(a), len(b)) else 1):
        rows = torch.randperm(len(a), generator=generator)[:size]
        others = rows if is_paired else torch.randperm(len(b), generator=generator)[:size]
        x = a[rows].double()
        y = b[others].double()
        xx = _cubic(x, x)
        yy = _cubic(y, y)
        xy = _cubic(x, y)
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1))
        cross = (xy.sum() - xy.trace()) / (size * (size - 1)) if is_paired else xy.mean()
        distances.append(within - 2 * cross)
    return float(torch.stack(distances).mean())


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def all_features(
    features: Features, batches: Iterable[Float[Tensor, "B 3 H W"]]
) -> Float[Tensor, "N D"]:
    """Compute the features of many images, batch by batch."""
    return torch.cat([features(batch) for batch in batches])
