"""Pictures on a contact sheet."""

from itertools import product

import numpy as np
import torch
from PIL import Image

from flowrl.images.contact_sheet import (
    CAPTION_LINES,
    CELL,
    LINE,
    MARGIN,
    _thumbnail,
    comparison,
    enlarged,
    moving,
    strip,
)


def test_a_small_picture_is_enlarged_by_a_whole_factor():
    """Mutation: blend pixels, fill the square with a broken factor, or enlarge what is large."""
    levels = np.arange(48 * 32 * 3, dtype=np.uint32).reshape(48, 32, 3) % 251
    small = Image.fromarray(levels.astype(np.uint8))
    large = enlarged(small, 128)
    assert large.size == (64, 96)
    assert np.array_equal(np.asarray(large)[::2, 1::2], np.asarray(small))
    assert enlarged(Image.new("RGB", (512, 512))).size == (512, 512)


def test_a_picture_that_is_no_square_keeps_its_shape():
    """32 x 96 and 96 x 32 pixels fill one side of their cell, at their own place on a sheet.

    Mutation: stretch pictures to squares, or swap their sides.
    """
    wide = torch.ones(3, 32, 96)
    large = torch.ones(3, 256, 512)
    for image, size in ((wide, (96, 32)), (wide.mT, (32, 96)), (large, (128, 64))):
        assert _thumbnail(image).size == size
    sheet = comparison(["x"], [("", torch.zeros(1, 3, 32, 96), [1.0])], per_row=1)
    top = MARGIN + CAPTION_LINES * LINE + 2
    cell = np.asarray(sheet)[top : top + CELL]
    dark = np.argwhere(cell.sum(2) == 0)
    assert np.ptp(dark, axis=0).tolist() == [31, 95]


def test_a_large_picture_is_reduced_by_all_its_pixels():
    """A fine chequered pattern is grey. Mutation: take the nearest pixel."""
    chequered = (torch.arange(512)[:, None] + torch.arange(512)).remainder(2).float()
    small = np.asarray(_thumbnail(chequered.expand(3, -1, -1)))
    assert small.shape == (CELL, CELL, 3)
    assert abs(small.astype(int) - 127).max() <= 2


def test_a_clip_is_a_strip_of_its_frames():
    """Nine frames of rising brightness, of which 0, 3, 5 and 8 stand beside each other, each in a
    cell of its own, and the second clip below the first though two fit beside each other of images.

    Mutation: show the first four, or let strips run into each other.
    """
    levels = torch.arange(9) * 20 / 255
    clip = levels[:, None, None, None].expand(9, 3, 32, 32)
    assert [strip(clip).getpixel((34 * i + 5, 5))[0] for i in range(4)] == [0, 60, 100, 160]
    columns = [
        ("before", torch.stack([clip] * 2), [0.1, 0.2]),
        ("now", torch.stack([clip] * 2), [0.0, 1.0]),
    ]
    sheet = comparison(["x", "y"], columns, per_row=2)
    cell_height = CELL + 4 * LINE + 2 * MARGIN
    assert sheet.size == (2 * (4 * CELL + 6 + MARGIN) + 2 * MARGIN, 2 * cell_height)
    for row, column in product(range(2), range(2)):
        top = row * cell_height + MARGIN + CAPTION_LINES * LINE + 2
        left = MARGIN + column * (4 * CELL + 6 + MARGIN)
        seen = [sheet.getpixel((left + i * (CELL + 2) + 64, top + 64))[0] for i in range(4)]
        assert seen == [0, 60, 100, 160]


def test_moving_sheets_show_one_time_each():
    """Of 31 frames every second one. Mutation: show strips, or the first sixteen."""
    levels = torch.arange(31) * 8 / 255
    clips = levels[None, :, None, None, None].expand(2, 31, 3, 32, 32)
    sheets = moving(["x", "y"], [("now", clips, [0.5, 0.5])], per_row=2)
    place = (MARGIN + 64, MARGIN + CAPTION_LINES * LINE + 2 + 64)
    assert [sheet.getpixel(place)[0] for sheet in sheets] == [16 * i for i in range(16)]
    still = comparison(["x", "y"], [("now", clips[:, 0], [0.5, 0.5])], per_row=2)
    assert np.array_equal(np.asarray(sheets[0]), np.asarray(still))


def test_what_was_edited_stands_before_its_images():
    """Blue, then black, each in a cell of its own. Mutation: draw it over the first image."""
    columns = [("", torch.zeros(1, 3, 32, 32), [1.0])]
    source = Image.new("RGB", (64, 32), (0, 0, 255))
    sheet = np.asarray(comparison(["x"], columns, per_row=1, sources=[source]))
    assert sheet.shape[1] == 2 * (CELL + MARGIN) + 2 * MARGIN
    top = MARGIN + CAPTION_LINES * LINE + 2
    cell = sheet[top : top + CELL]
    blue = np.argwhere((cell == (0, 0, 255)).all(2))
    assert blue.min(0).tolist() == [0, MARGIN] and np.ptp(blue, axis=0).tolist() == [63, 127]
    black = np.argwhere((cell == 0).all(2))
    assert black.min(0).tolist() == [0, 2 * MARGIN + CELL]
