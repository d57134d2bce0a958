"""Pictures on a contact sheet."""

import numpy as np
import torch
from PIL import Image

from flowrl.images.contact_sheet import CELL, _thumbnail, enlarged


def test_a_small_picture_is_enlarged_by_a_whole_factor():
    """Mutation: blend pixels, fill the square with a broken factor, or enlarge what is large."""
    levels = np.arange(48 * 32 * 3, dtype=np.uint32).reshape(48, 32, 3) % 251
    small = Image.fromarray(levels.astype(np.uint8))
    large = enlarged(small, 128)
    assert large.size == (64, 96)
    assert np.array_equal(np.asarray(large)[::2, 1::2], np.asarray(small))
    assert enlarged(Image.new("RGB", (512, 512))).size == (512, 512)


def test_a_large_picture_is_reduced_by_all_its_pixels():
    """A fine chequered pattern is grey. Mutation: take the nearest pixel."""
    chequered = (torch.arange(512)[:, None] + torch.arange(512)).remainder(2).float()
    small = np.asarray(_thumbnail(chequered.expand(3, -1, -1)))
    assert small.shape == (CELL, CELL, 3)
    assert abs(small.astype(int) - 127).max() <= 2
