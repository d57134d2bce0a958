"""Real images with captions: read from a folder, rendered from captions, fitted to a size."""

import json

import numpy as np
import pytest
from PIL import Image

from flowrl.errors import UserError
from flowrl.images.captioned import fitted
from flowrl.prompts.captioned_folder import captioned_folder
from flowrl.prompts.scenes import rendered_scenes
from flowrl.shapes.grammar import parse
from flowrl.shapes.verify import verify


def save(path, colour=(200, 10, 10), size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def read(folder, caption="text"):
    return captioned_folder(path=str(folder), caption=caption)


def write(folder, *rows):
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")


def test_metadata_names_images_and_captions(tmp_path):
    """In their order, below the folder, and nothing else is read. Mutation: read all images."""
    save(tmp_path / "b.png", (1, 2, 3))
    save(tmp_path / "deep" / "a.png", (4, 5, 6), size=(3, 8))
    save(tmp_path / "other.png")
    write(
        tmp_path,
        {"file_name": "deep/a.png", "text": "a cat", "more": 1},
        {"file_name": "b.png", "text": "a dog"},
    )
    first, second = read(tmp_path)
    assert (first.caption, second.caption) == ("a cat", "a dog")
    assert (first.size, second.size) == ((8, 3), (4, 6))
    assert first.read().getpixel((0, 0)) == (4, 5, 6)
    assert second.name == str(tmp_path / "b.png")


def test_the_captions_key_may_be_another(tmp_path):
    """Mutation: read `text` whatever is configured."""
    save(tmp_path / "a.png")
    write(tmp_path, {"file_name": "a.png", "prompt": "a cat"})
    assert [image.caption for image in read(tmp_path, "prompt")] == ["a cat"]
    with pytest.raises(UserError, match="line 1: no 'text'; it has 'file_name', 'prompt'"):
        read(tmp_path)


def test_captions_beside_the_images(tmp_path):
    """By name, lines joined. Mutation: the order of the disk, or the first line alone."""
    for name, text in (("b", "a dog\non grass\n"), ("a", "a cat\n")):
        save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "readme.txt").write_text("no image's")
    assert [image.caption for image in read(tmp_path)] == ["a cat", "a dog on grass"]


def damaged(folder):
    (folder / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    write(folder, {"file_name": "a.png", "text": "a cat"})


CASES = {
    "no such folder": (lambda folder: folder.rmdir(), "no such folder; give a folder"),
    "empty": (lambda folder: None, "no images; give a folder with metadata.jsonl"),
    "missing": (
        lambda folder: write(folder, {"file_name": "a.png", "text": "a cat"}),
        r"metadata.jsonl line 1: .*a.png: cannot be read as a picture \(no such file\)",
    ),
    "damaged": (damaged, r"metadata.jsonl line 1: .*a.png: cannot be read as a picture"),
    "without a name": (lambda folder: write(folder, {"text": "a cat"}), "no 'file_name'"),
    "a name that is none": (
        lambda folder: write(folder, {"file_name": 7, "text": "a cat"}),
        "line 1: 'file_name': 7 is no path of an image",
    ),
    "an empty caption": (
        lambda folder: write(folder, {"file_name": "a.png", "text": " "}),
        "line 1: 'text': the prompt is empty",
    ),
    "without a caption": (
        lambda folder: save(folder / "a.png"),
        "a.png: no caption; write it into a.txt",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_trained_on_is_refused_in_one_line(case, tmp_path):
    """Mutation: leave such an image out."""
    make, words = CASES[case]
    folder = tmp_path / "images"
    folder.mkdir()
    make(folder)
    with pytest.raises(UserError, match=words) as error:
        read(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_a_picture_is_scaled_and_cut_evenly():
    """Eight columns at 0, 10, .. 70 of red, four rows: a square of four is the middle ones.
    Mutation: squeeze it, cut one side, or keep 8-bit levels.
    """
    columns = np.zeros((4, 8, 3), np.uint8)
    columns[:, :, 0] = np.arange(8) * 10
    pixels = fitted(Image.fromarray(columns), 4, 4)
    assert pixels.shape == (3, 4, 4) and pixels.dtype == np.float32
    np.testing.assert_allclose(pixels[0] * 255, np.tile([20, 30, 40, 50], (4, 1)), rtol=1e-6)
    assert not pixels[1:].any()
    # Twice the size of one colour stays that colour.
    small = fitted(Image.new("RGB", (8, 16), (51, 102, 255)), 4, 4)
    np.testing.assert_allclose(small[:, 2, 2], [0.2, 0.4, 1.0], rtol=1e-6)


def test_scenes_show_what_their_captions_say():
    """By the verifier, all atoms. Mutation: render the scene of another caption."""
    scenes = rendered_scenes(split="held_in", count=42, seed=3)
    again = rendered_scenes(split="held_in", count=42, seed=3)
    other = rendered_scenes(split="held_in", count=42, seed=4)
    pixels = np.stack([np.asarray(scene.read()) for scene in scenes])
    captions = [parse(scene.caption) for scene in scenes]
    assert all(not caption.is_held_out for caption in captions)
    verdicts = verify(pixels.astype(np.float32) / 255, captions)
    assert sum(verdict.strict for verdict in verdicts) == 42
    assert [scene.caption for scene in scenes] == [scene.caption for scene in again]
    assert np.array_equal(pixels, np.stack([np.asarray(scene.read()) for scene in again]))
    assert [scene.caption for scene in scenes] != [scene.caption for scene in other]
    assert scenes[0].size == (32, 32)
