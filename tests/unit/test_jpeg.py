import io

import numpy as np
import pytest
import torch
from PIL import Image

from flowrl.rewards.images import to_tensor
from flowrl.rewards.jpeg import JPEG
from flowrl.types import Prompt

FLAT = Image.new("RGB", (64, 64), (90, 120, 30))
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
PROMPTS = [Prompt("a"), Prompt("b")]


def test_bytes_of_a_file():
    """-kB / 500 of the very file that Pillow writes. Mutation: 1024 bytes a kB, another quality, or
    PNG.
    """
    file = io.BytesIO()
    NOISE.save(file, format="JPEG", quality=95)
    output = JPEG(quality=95, scale=-0.002)([FLAT, NOISE], PROMPTS)
    assert output.values[1].item() == pytest.approx(-len(file.getvalue()) / 1000 / 500, rel=1e-6)
    assert output.parts["kilobytes"][1].item() == pytest.approx(
        len(file.getvalue()) / 1000, rel=1e-6
    )
    assert output.is_valid.all()


def test_compressible_above_incompressible_and_the_reverse():
    """Mutation: swap the signs."""
    small, large = (
        JPEG(quality=95, scale=scale)([FLAT, NOISE], PROMPTS).values for scale in (-0.002, 1.0)
    )
    assert small[0] > small[1] and large[0] < large[1]


def test_tensors_give_the_same_number():
    """Mutation: save without rounding to 8 bits."""
    reward = JPEG(quality=80, scale=1.0)
    images = to_tensor([FLAT, NOISE])
    assert torch.equal(reward(images, PROMPTS).values, reward([FLAT, NOISE], PROMPTS).values)


@pytest.mark.parametrize(
    ("quality", "scale", "name"),
    [(0, 1.0, "quality=0"), (101, 1.0, "quality=101"), (95, 0, "scale")],
)
def test_options_are_checked(quality, scale, name):
    """Mutation: drop a check."""
    with pytest.raises(ValueError, match=f"reward.{name}"):
        JPEG(quality=quality, scale=scale)
