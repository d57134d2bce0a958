import numpy as np
import pytest
import torch
from PIL import Image

from flowrl.rewards.images import to_pictures, to_tensor


def test_tensors_and_pictures_are_one():
    """128.6 / 255 becomes 129 in both. Mutation: truncate, or let a picture pass unrounded."""
    images = torch.full((2, 3, 2, 2), 128.6 / 255)
    images[1, 0] = 1.7
    pictures = to_pictures(images)
    assert pictures[0].getpixel((0, 0)) == (129, 129, 129) and pictures[1].getpixel((1, 1)) == (
        255,
        129,
        129,
    )
    assert torch.equal(to_tensor(images), to_tensor(pictures))
    assert to_tensor(images)[0, 0, 0, 0] == pytest.approx(129 / 255, rel=1e-7)


def test_other_modes_become_rgb():
    """Mutation: hand a grey or transparent picture on."""
    assert to_tensor([Image.new("L", (2, 2), 255), Image.new("RGBA", (2, 2), "white")]).shape == (
        2,
        3,
        2,
        2,
    )


def test_16_bit_pictures_are_scaled():
    """65,535 / 2 is level 128. Mutation: Pillow's conversion, which makes all above 255 white."""
    pictures = [
        Image.fromarray(np.full((2, 2), level, dtype=np.uint16)) for level in (0, 32768, 65535)
    ]
    assert (to_tensor(pictures)[:, 0, 0, 0] * 255).tolist() == pytest.approx([0, 128, 255])


def test_no_picture_of_nothing():
    """Mutation: turn NaN into black."""
    with pytest.raises(ValueError, match="NaN"):
        to_pictures(torch.full((1, 3, 2, 2), torch.nan))
