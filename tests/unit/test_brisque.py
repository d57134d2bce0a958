import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from flowrl.rewards.brisque import BRISQUE, _fit, features
from flowrl.rewards.images import to_tensor
from flowrl.rewards.specimens import pairs
from flowrl.training.reward import RewardModule
from flowrl.types import Prompt

PAIRS = [pair for pair in pairs() if pair.kind == "sharpness"]


@pytest.fixture(scope="module")
def brisque():
    return BRISQUE()


def test_blurred_is_worse_than_sharp_and_more_so_the_more_it_is(brisque):
    """Mutation: forget the sign, or swap the features of the two scales."""
    for pair in PAIRS:
        blurred = [pair.good.filter(ImageFilter.GaussianBlur(radius)) for radius in (1.5, 2, 3)]
        values = brisque([pair.good, *blurred], [pair.prompt] * 4).values.tolist()
        assert values == sorted(values, reverse=True) and values[0] > values[-1] + 0.2


def test_noise_and_blocks_are_worse_than_sharp(brisque):
    """Mutation: take the score for quality."""
    import io

    sharp = PAIRS[0].good
    noisy = np.asarray(sharp) + np.random.default_rng(0).normal(0, 40, (256, 256, 3))
    file = io.BytesIO()
    sharp.save(file, format="JPEG", quality=4)
    pictures = [sharp, Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), Image.open(file)]
    best, *others = brisque(pictures, [Prompt("")] * 3).values.tolist()
    assert best > max(others)


def test_moments_give_back_the_distribution():
    """A Gaussian has shape 2; |left| / |right| of a skewed one is found. Mutation: swap left and
    right, or the grid.
    """
    values = torch.randn(
        1, 200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    alpha, left, right = _fit(values)
    assert alpha.item() == pytest.approx(2.0, abs=0.03)
    assert left.item() == pytest.approx(1, rel=2e-2) or abs(left.item() - 1) < 0.02
    _, left, right = _fit(torch.where(values < 0, 3 * values, values))
    assert (left / right).item() == pytest.approx(9, rel=1e-2) or abs(
        (left / right).item() - 9
    ) < 0.2


def test_a_batch_is_its_images(brisque):
    """Mutation: a statistic over the batch."""
    pictures = [pair.good for pair in PAIRS]
    together = brisque(pictures, [Prompt("")] * 3).values
    alone = torch.cat([brisque([picture], [Prompt("")]).values for picture in pictures])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        brisque(to_tensor(pictures), [Prompt("")] * 3).values, together, rtol=0, atol=0
    )


def test_an_image_without_texture_is_missing(brisque):
    """Mutation: score rounding errors."""
    images = torch.full((2, 3, 64, 64), 0.37)
    images[1] = to_tensor([PAIRS[0].good])[0, :, :64, :64]
    output = RewardModule(reward=brisque, max_missing=1.0).score(images, [Prompt("")] * 2)
    assert output.is_valid.tolist() == [False, True]


def test_features_of_both_scales():
    """Mutation: the same scale twice."""
    both = features(to_tensor([PAIRS[0].good]))
    assert both.shape == (1, 36) and (both[:, :18] - both[:, 18:]).abs().max() > 0.1
