"""Pictures on disk as batches of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from flowrl.assessment.distances import Features, all_features
from flowrl.errors import UserError

KINDS = {".png", ".jpg", ".jpeg", ".webp"}
BATCH = 64


def folder_features(folder: str, features: Features) -> Float[Tensor, "N D"]:
    """The features of the pictures in a folder, of whatever sizes. Raises ValueError below two, or on a damaged one."""
    paths = [path for path in Path(folder).expanduser().rglob("*") if path.suffix.lower() in KINDS]
    if len(paths) < 2:
        raise UserError(f"--reference {folder}: {len(paths)} pictures there; distances need at least 2")
    try:
        return all_features(features, read_images(sorted(paths, key=lambda path: (_size(path), path))))
    except OSError as error:
        raise UserError(f"--reference {folder}: a picture is damaged ({error})") from error


def _size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def read_images(paths: Sequence[Path]) -> Iterator[Float[Tensor, "B 3 H W"]]:
    """Pictures as tensors in [0, 1], in order and in batches; where the size changes, a new batch begins."""
    batch: list[np.ndarray] = []
    for path in paths:
        with Image.open(path) as opened:
            picture = np.array(opened.convert("RGB"))
        if batch and (len(batch) == BATCH or picture.shape != batch[0].shape):
            yield _stack(batch)
            batch = []
        batch.append(picture)
    if batch:
        yield _stack(batch)


def _stack(pictures: Sequence[np.ndarray]) -> Float[Tensor, "B 3 H W"]:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
