"""A reader of pictures on disk, as batches of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from flowrl.errors import UserError
from flowrl.evaluation.distances import Features, all_features
from flowrl.images.pictures import is_picture, picture_size, read_rgb

BATCH = 64


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder's pictures, and its other files with the reason why each is not read."""

    name: str
    pictures: list[Path]
    others: list[tuple[Path, str]]

    @classmethod
    def read(cls, name: str) -> Folder:
        """List the files below a folder: hidden ones, such as a Mac's ._x.png, and other kinds are
        not read.
        """
        root = Path(name).expanduser()
        pictures = []
        others = []
        # The folder itself may be hidden; what lies below it may not.
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            segments = path.relative_to(root).parts
            if any(segment.startswith(".") for segment in segments):
                others.append((path, "hidden"))
            elif not is_picture(path):
                others.append((path, "no kind of picture that is read here"))
            else:
                pictures.append(path)
        return cls(name, pictures, others)

    def told(self) -> str:
        """Tell the numbers of pictures and of other files, the first of those by name."""
        text = f"{len(self.pictures)} pictures"
        if not self.others:
            return text
        path, reason = self.others[0]
        return f"{text}, {len(self.others)} files not read (first: {path.name}, {reason})"


def folder_features(folder: str, features: Features) -> tuple[Float[Tensor, "N D"], str]:
    """Compute the features of the pictures in a folder, of whatever sizes, and tell how many there
    are.

    Raises UserError below two pictures, and for one that is damaged or too large, by its name.
    """
    listed = Folder.read(folder)
    if len(listed.pictures) < 2:
        raise UserError(f"--reference {folder}: {listed.told()} there; distances need at least 2")
    # By size first, so that batches are full: a batch holds pictures of one size.
    sizes = {path: picture_size(path) for path in listed.pictures}
    paths = sorted(sizes, key=lambda path: (sizes[path], path))
    computed = all_features(features, read_images(paths))
    return computed, listed.told()


def read_images(paths: Sequence[Path]) -> Iterator[Float[Tensor, "B 3 H W"]]:
    """Yield pictures as tensors in [0, 1], in order and in batches; where the size changes, a new
    batch begins.
    """
    batch: list[np.ndarray] = []
    for path in paths:
        picture = np.array(read_rgb(path))  # [H, W, 3], 0 to 255
        is_full = len(batch) == BATCH
        if batch and (is_full or picture.shape != batch[0].shape):
            yield _stack(batch)
            batch = []
        batch.append(picture)
    if batch:
        yield _stack(batch)


def _stack(pictures: Sequence[np.ndarray]) -> Float[Tensor, "B 3 H W"]:
    levels = torch.from_numpy(np.stack(pictures))  # [B, H, W, 3]
    return levels.permute(0, 3, 1, 2).float() / 255
