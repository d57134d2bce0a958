"""Images with captions are read from a folder: its `metadata.jsonl` names the caption of each
image, as Hugging Face's `imagefolder` has it, or a text file beside each image holds it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from flowrl.errors import UserError
from flowrl.images.captioned import CaptionedImage
from flowrl.images.pictures import is_picture, read_upright
from flowrl.prompts.jsonl import read_object_line
from flowrl.prompts.lines import checked_text, read_lines
from flowrl.values.bounds import Text
from flowrl.values.check import checked

METADATA = "metadata.jsonl"
"""The file that holds one object for each image: its `file_name` and its caption."""
FILE_NAME = "file_name"


@checked("regularizer.images")
def captioned_folder(*, path: Text, caption: Text) -> list[CaptionedImage]:
    """Read the captions of a folder's images, and each image once to see that it can be read.

    Where the folder has a `metadata.jsonl`, its lines are the images, in their order: `caption`
    names the key of the text. Otherwise the images are those directly in the folder, by name, each
    with its caption in a file of the same stem that ends in .txt. Raises UserError, naming file and
    line, for a folder without images, an image without a caption, and an image that is missing or
    damaged.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        kind = "a file" if root.is_file() else "no such folder"
        raise UserError(
            f"regularizer.images.path={path}: {kind}; give a folder of images with captions"
        )
    has_metadata = (root / METADATA).is_file()
    pairs = _of_metadata(root, caption) if has_metadata else _of_text_files(root)
    images = [_image(file, text, place) for file, text, place in pairs]
    if not images:
        raise UserError(
            f"regularizer.images.path={path}: no images; give a folder with {METADATA}, or with a "
            "text file beside each image"
        )
    return images


def _of_metadata(root: Path, caption: str) -> Iterator[tuple[Path, str, str]]:
    """Read path, caption and place of each image that the metadata name."""
    file = root / METADATA
    for number, line in read_lines(str(file)):
        place = f"{file} line {number}"
        data = read_object_line(line, place)
        for key in (FILE_NAME, caption):
            if key not in data:
                present = ", ".join(map(repr, data))
                raise UserError(f"{place}: no {key!r}; it has {present}")
        name = data[FILE_NAME]
        if not isinstance(name, str) or not name:
            raise UserError(f"{place}: {FILE_NAME!r}: {name!r:.40} is no path of an image")
        yield root / name, checked_text(data[caption], f"{place}: {caption!r}"), place


def _of_text_files(root: Path) -> Iterator[tuple[Path, str, str]]:
    """Find path, caption and place of each image of a folder without metadata."""
    for path in sorted(root.iterdir()):
        if not is_picture(path):
            continue
        text_file = path.with_suffix(".txt")
        if not text_file.is_file():
            raise UserError(
                f"{path}: no caption; write it into {text_file.name}, or one line for each image "
                f"into {METADATA}"
            )
        lines = [line.strip() for _, line in read_lines(str(text_file))]
        yield path, checked_text(" ".join(lines), str(text_file)), str(path)


def _image(path: Path, caption: str, place: str) -> CaptionedImage:
    """Return an image after reading it once, since one that cannot be read would fail in the middle
    of a run.
    """
    try:
        width, height = read_upright(path).size
    except UserError as error:
        # Without metadata the place is the path, which the error begins with.
        label = "" if place == str(path) else f"{place}: "
        raise UserError(f"{label}{error}") from error
    return CaptionedImage(caption, str(path), (height, width), partial(read_upright, path))
