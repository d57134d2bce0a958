import math

import pytest
import torch

from flowrl.images.image_statistics import MEANINGS, panel

RAMP = torch.linspace(0, 1, 32).expand(1, 3, 32, 32)


def test_an_empty_image():
    """Mutation: a high-frequency share of 0 / 0, or brightness as a sum of channels."""
    stats = panel(torch.full((1, 3, 16, 16), 0.25))
    assert stats.keys() == MEANINGS.keys()
    assert {name: value.item() for name, value in stats.items()} == pytest.approx(
        {"edge_density": 0, "colour_entropy": 0, "brightness": 0.25, "high_frequency": 0}, abs=1e-6
    )


def test_edges_are_where_brightness_jumps():
    """A step of 1 across 32 pixels has gradient 1/2 in two columns; a ramp of 1/31 has none above
    0.1.

    Mutation: Sobel's weights without their scale, or one direction only.
    """
    step = (torch.arange(32) >= 16).float().expand(1, 3, 32, 32)
    assert panel(step)["edge_density"].item() == pytest.approx(2 / 32)
    assert panel(step.transpose(2, 3))["edge_density"].item() == pytest.approx(2 / 32)
    assert panel(RAMP)["edge_density"].item() == 0
    steep = (torch.arange(32) * 0.11).clamp(max=1).expand(1, 3, 32, 32)
    assert panel(steep)["edge_density"].item() > 0.2


def test_a_picture_that_is_no_square():
    """The left half of 16 x 32 pixels is white: one bit, half bright, an edge two columns wide.
    Turned, it is the same. Mutation: one side for both.
    """
    wide = (torch.arange(32) < 16).float().expand(1, 3, 16, 32)
    for image in (wide, wide.mT):
        numbers = {name: value.item() for name, value in panel(image).items()}
        high = numbers.pop("high_frequency")
        assert high == pytest.approx(panel(wide)["high_frequency"].item(), rel=1e-4)
        expected = {"edge_density": 2 / 32, "colour_entropy": 1, "brightness": 0.5}
        assert numbers == pytest.approx(expected, rel=1e-6)


def test_entropy_of_colours_in_bits():
    """Two colours in equal parts are one bit, four are two. Mutation: natural logarithm, or one
    histogram for all.
    """
    images = torch.zeros(2, 3, 4, 4)
    images[0, 0, :2] = 1.0
    images[1, 0, :2], images[1, 2, :, :2] = 1.0, 1.0
    assert panel(images)["colour_entropy"].tolist() == pytest.approx([1, 2], abs=1e-5)


def test_brightness_weighs_colours_as_eyes_do():
    """Mutation: the plain mean of the channels."""
    green = torch.zeros(1, 3, 4, 4)
    green[:, 1] = 1.0
    assert panel(green)["brightness"].item() == pytest.approx(0.587)


def test_high_frequencies():
    """A checkerboard is all of them, one slow wave none. Mutation: leave the mean in, or a cut at
    0.5 cycles.
    """
    checks = (torch.arange(16)[:, None] + torch.arange(16)) % 2
    wave = 0.5 + 0.5 * torch.sin(2 * math.pi * torch.arange(16) / 16)
    images = torch.stack([checks.float().expand(3, 16, 16), wave.expand(3, 16, 16)])
    assert panel(images)["high_frequency"].tolist() == pytest.approx([1, 0], abs=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_pixels_that_are_no_numbers(bad):
    """Such an image has no statistics, and its neighbours keep theirs bitwise.

    Mutation: count NaN as a pixel without edges and as the colour black.
    """
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = panel(images)
    images[1, 0, 3, 4] = bad
    for name, values in panel(images).items():
        assert values.isnan().tolist() == [False, True, False]
        assert torch.equal(values[::2], expected[name][::2])
