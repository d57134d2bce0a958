"""Distances between two sets of images: the Fréchet and the kernel distance on the features of a
named network.

With Inception's weights at hand (torch-fidelity's file) they are FID and KID. Without them the same
distances are taken on `random-conv-128`, a small network of fixed random weights: they then tell
sets apart by colour and texture, rank runs that are compared with each other, and must not be
compared with published FID or KID.

The network is torch-fidelity's, which torchmetrics wraps too, but then downloads its weights by
itself. The distances are written out here because those of pairs of images from the same noise,
which compare two policies with far fewer images, exist in neither.
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

    The weights are the same in every process and on every machine, so that distances taken with
    them can be compared between runs.
    """

    name = "random-conv-128"

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(SEED)
        layers: list[nn.Module] = []
        num_inputs = 3
        for num_outputs in CHANNELS:
            layer = nn.Conv2d(
                num_inputs,
                num_outputs,
                kernel_size=3,
                stride=2,
                padding=1,
                bias=False,
            )
            layer.requires_grad_(False)
            normal = torch.randn(layer.weight.shape, generator=generator)
            # He's scale keeps the size of activations through layers of ReLU: 9 weights an input.
            layer.weight.copy_(normal * (2 / (9 * num_inputs)) ** 0.5)
            layers += [layer, nn.ReLU()]
            num_inputs = num_outputs
        self.layers = nn.Sequential(*layers)

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """Compute 128 features an image, float64."""
        centred = images.float() * 2 - 1
        small = interpolate(
            centred,
            (SIDE, SIDE),
            mode="bilinear",
            antialias=True,
            align_corners=False,
        )
        maps = self.layers(small).flatten(2).double()  # [B, channels, pixels]
        return torch.cat([maps.mean(2), maps.std(2)], 1)


class Inception:
    """The 2048 features of torch-fidelity's InceptionV3, from its weights file; needs the extra
    `fid`.

    Raises UserError where there is no such file, or the extra is not installed.
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
            "inception-v3-compat",
            ["2048"],
            feature_extractor_weights_path=weights,
        )

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """Compute features of images in 8 bits, which the network resizes itself, as published
        scores are taken; float64.
        """
        levels = (images.clamp(0, 1) * 255).round().byte()
        # The network gives one tensor for each layer that was asked for: here one.
        features = self.network(levels)[0]
        return features.double()


def frechet(a: Float[Tensor, "N D"], b: Float[Tensor, "M D"]) -> float:
    """Return |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)) of two sets' features
    (arXiv 1706.08500), in float64. Each set needs two images or more.
    """
    mean_a = a.double().mean(0)
    mean_b = b.double().mean(0)
    cov_a = torch.cov(a.double().T)
    cov_b = torch.cov(b.double().T)
    # tr (cov_a cov_b)^(1/2) is the sum of the singular values of cov_a^(1/2) cov_b^(1/2), which
    # needs no root of a matrix that is not symmetric.
    root = torch.linalg.svdvals(_root(cov_a) @ _root(cov_b)).sum()
    gap = (mean_a - mean_b).square().sum()
    return float(gap + cov_a.trace() + cov_b.trace() - 2 * root)


def _root(covariance: Tensor) -> Tensor:
    """Return the symmetric root of a covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    # Of fewer images than features many eigenvalues are 0, and come out a little below.
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
    # A subset of all images is always the same one.
    num_subsets = SUBSETS if size < max(len(a), len(b)) else 1
    distances = []
    for _ in range(num_subsets):
        rows = torch.randperm(len(a), generator=generator)[:size]
        others = rows
        if not is_paired:
            others = torch.randperm(len(b), generator=generator)[:size]
        x = a[rows].double()
        y = b[others].double()
        xx = _cubic(x, x)
        yy = _cubic(y, y)
        xy = _cubic(x, y)
        # Unbiased: an image is not compared with itself.
        num_pairs = size * (size - 1)
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / num_pairs
        cross = (xy.sum() - xy.trace()) / num_pairs if is_paired else xy.mean()
        distances.append(within - 2 * cross)
    return float(torch.stack(distances).mean())


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    """Return the kernel between all rows of two sets, of shape (rows of x, rows of y)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def all_features(
    features: Features, batches: Iterable[Float[Tensor, "B 3 H W"]]
) -> Float[Tensor, "N D"]:
    """Compute the features of many images, batch by batch."""
    return torch.cat([features(batch) for batch in batches])
