"""JPEG size is a reward: compressibility and incompressibility, the calibration tasks of DDPO
(arXiv 2305.13301).
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from PIL import Image

from flowrl.rewards.images import to_pictures
from flowrl.rewards.outputs import all_valid
from flowrl.rewards.protocol import Images
from flowrl.types import Prompt, RewardOutput
from flowrl.values.bounds import NonZero, Quality
from flowrl.values.check import checked


class JPEG:
    """Kilobytes (1000 bytes) of each image as a JPEG of `quality`, times `scale`; the prompt does
    not matter.

    `quality` is Pillow's, from 1 to 100, and `scale` is negative where small files are wanted.
    flow_grpo's incompressibility has scale 1, its compressibility -1/500. Part: kilobytes.
    """

    @checked("reward")
    def __init__(self, *, quality: Quality, scale: NonZero) -> None:
        self.quality = quality
        self.scale = scale

    part_names = ("kilobytes",)

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        sizes = [self._size(picture) / 1000 for picture in to_pictures(images)]
        kilobytes = torch.tensor(sizes)
        return all_valid(kilobytes * self.scale, {"kilobytes": kilobytes})

    def _size(self, picture: Image.Image) -> int:
        """Return the bytes of a picture's JPEG."""
        file = io.BytesIO()
        picture.save(file, format="JPEG", quality=self.quality)
        return file.tell()
