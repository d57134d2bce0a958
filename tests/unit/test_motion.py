"""The numbers of clips beside the hacking panel."""

import math

import pytest
import torch

from flowrl.images.image_statistics import MEANINGS, panel
from flowrl.images.motion import ALL_MEANINGS, looks_of, motion


def clips(*brightness):
    """Grey clips (B F 3 2 2) of these brightnesses, a list for each."""
    return torch.tensor(brightness)[:, :, None, None, None].repeat(1, 1, 3, 2, 2)


def test_motion_is_what_a_pixel_changes_by():
    """0 -> 0.2 -> 0.2 -> 0.8: changes 0.2, 0, 0.6 with mean 0.8 / 3 and squares' mean 0.4 / 3. A
    clip that goes there and back in equal steps moves without variation, one that stands still not
    at all.

    Mutation: take signed changes, the last frame against the first, or the deviation of n - 1.
    """
    got = motion(clips([0.0, 0.2, 0.2, 0.8], [0.1, 0.4, 0.1, 0.4], [0.5] * 4))
    mean = 0.8 / 3
    deviation = math.sqrt(0.4 / 3 - mean**2)
    assert got["motion"].tolist() == pytest.approx([mean, 0.3, 0])
    assert got["motion_variation"].tolist() == pytest.approx([deviation / mean, 0, 0], abs=1e-5)


def test_only_what_moves_counts():
    """Two numbers of twelve change, one up by 0.6 and one down. Mutation: the largest change, or
    that of the brightness.
    """
    clip = torch.zeros(1, 2, 3, 2, 2)
    clip[0, 1, 0, 1, 1] = 0.6
    clip[0, 0, 1, 0, 0] = 0.6
    assert motion(clip)["motion"].item() == pytest.approx(0.1)


def test_a_clips_panel_is_the_mean_of_its_frames():
    """And an image's is as it was, bitwise. Mutation: measure the first frame, or show motion for
    images.
    """
    images = torch.rand(2, 5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    got = looks_of(images)
    assert list(got) == list(ALL_MEANINGS)
    for name in MEANINGS:
        frames = torch.stack([panel(images[:, number])[name] for number in range(5)])
        assert torch.allclose(got[name], frames.mean(0), rtol=1e-6)
        assert not torch.allclose(got[name], frames[0], rtol=1e-3)
    alone = looks_of(images[:, 0])
    assert alone.keys() == MEANINGS.keys()
    assert all(torch.equal(alone[name], panel(images[:, 0])[name]) for name in MEANINGS)


def test_a_pixel_that_is_no_number_shows():
    """Mutation: leave frames that are no numbers out."""
    got = looks_of(clips([0.1, math.nan, 0.3], [0.1, 0.2, 0.3]))
    assert all(values[0].isnan() and values[1].isfinite() for values in got.values())
