"""Pictures of all modes as 8-bit RGB, and a folder of them whatever else is there."""

import math
import re
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from flowrl.evaluation.pictures import folder_features
from flowrl.images.pictures import TILE, read_rgb, to_pixels, to_rgb

LEVELS = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
SCALED = [0, 0, 1, 1, 128, 255]
"""In steps of 257: 128 is half a step less 1/2, 129 half a step more."""


def means(images):
    return images.mean((2, 3))


@pytest.mark.parametrize("ending", ["png", "tif", "jp2"])
def test_16_bits_are_scaled(tmp_path, ending):
    """Mutation: Pillow's conversion, which makes everything above 255 white; or the high byte,
    which gives 0 at 129.
    """
    path = tmp_path / f"a.{ending}"
    Image.fromarray(LEVELS).save(path, **({"irreversible": False} if ending == "jp2" else {}))
    assert np.array(read_rgb(path))[0].tolist() == [[level] * 3 for level in SCALED]


def test_each_of_65536_levels_is_rounded():
    """Against exact fractions. Mutation: products of 16 bits, which overflow; or a tile at another
    one's place.
    """
    levels = np.arange(65536, dtype=np.uint16)
    wanted = [math.floor(Fraction(255 * level, 65535) + Fraction(1, 2)) for level in range(65536)]
    for shape in ((64, 1024), (1024, 64)):  # more than a tile in either direction
        assert max(shape) > TILE
        picture = Image.fromarray(levels.reshape(shape))
        for pixels in (np.array(to_rgb(picture)), to_pixels(picture)):
            assert pixels.shape == (*shape, 3)
            assert all(pixels[:, :, i].ravel().tolist() == wanted for i in range(3))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_pixels_are_those_of_the_whole_picture(mode):
    """Sides that are no multiples of a tile's. Mutation: swap rows and columns, or lose the rest at
    the edges.
    """
    picture = Image.effect_noise((TILE + 7, 2 * TILE + 1), 90).convert("RGB").convert(mode)
    assert np.array_equal(to_pixels(picture), np.array(picture.convert("RGB")))


def test_levels_without_a_range_are_refused(tmp_path):
    """Mutation: cut floating-point levels of 0 to 1 to black."""
    for mode in ("I", "F"):
        with pytest.raises(ValueError, match=f"mode {mode}"):
            to_rgb(Image.new(mode, (2, 2)))
    Image.new("F", (2, 2)).save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match=r"a\.tiff: cannot be read as a picture \(32-bit levels"):
        read_rgb(tmp_path / "a.tiff")


def test_reference_pictures_of_several_sizes(tmp_path):
    """Mutation: stack pictures of two sizes."""
    for i, size in enumerate([(8, 8), (8, 4), (8, 8)]):
        Image.new("RGB", size, (i, 0, 0)).save(tmp_path / f"{i}.png")
    sizes = []

    def features(images):
        sizes.append(tuple(images.shape))
        return means(images)

    values, told = folder_features(str(tmp_path), features)
    assert (values[:, 0] * 255).tolist() == pytest.approx([1, 0, 2]) and told == "3 pictures"
    assert sizes == [(1, 3, 4, 8), (2, 3, 8, 8)]


def test_a_folder_with_other_files(tmp_path):
    """Every kind that Pillow reads counts, in any case and any depth; the rest is told with the
    first one's name.

    Mutation: leave out gif, bmp, tiff or avif, refuse the folder for a Mac's hidden file, or say
    nothing of the rest.
    """
    (tmp_path / "deep").mkdir()
    for i, ending in enumerate(["png", "JPG", "gif", "bmp", "tiff", "avif", "webp", "jfif"]):
        Image.new("RGB", (8, 8), (255, 0, 0)).save(
            tmp_path / "deep" / f"{i}.{ending}", **kind(ending)
        )
    (tmp_path / "._x.png").write_bytes(b"\0\5\x16\7")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "z.heic").write_text("x")
    values, told = folder_features(str(tmp_path), means)
    assert (
        values.shape == (8, 3)
        and float(values[:, 0].min()) > 0.95
        and float(values[:, 1].max()) < 0.05
    )
    assert told == "8 pictures, 3 files not read (first: ._x.png, hidden)"


def kind(ending):
    return {"format": "JPEG"} if ending in ("JPG", "jfif") else {}


def bomb(path):
    """A PNG of 400 million pixels, two colours, in some 50 kB."""
    Image.new("1", (20_000, 20_000)).save(path)


def cut(path):
    path.write_bytes(path.with_name("0.png").read_bytes()[:-30])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (bomb, "400000000 pixels"),
        (cut, "truncated"),
        (lambda path: path.write_text("no picture"), "damaged, or no picture"),
        (lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0"), "damaged, or no picture"),
    ],
)
def test_a_damaged_picture_is_named(tmp_path, damage, reason):
    """In one line, whatever Pillow raises. Mutation: a traceback, or the folder's name alone."""
    for i in range(2):
        Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / f"{i}.png")
    damage(tmp_path / "bad.png")
    with pytest.raises(
        ValueError, match=rf"^{re.escape(str(tmp_path))}/bad\.png: .*{reason}.*mend or remove it$"
    ):
        folder_features(str(tmp_path), means)


def test_too_few_pictures(tmp_path):
    """Mutation: a distance of one picture."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(
        ValueError, match=r"--reference .*: 1 pictures there; distances need at least 2"
    ):
        folder_features(str(tmp_path), means)
    with pytest.raises(ValueError, match="0 pictures there"):
        folder_features(str(tmp_path / "none"), means)
