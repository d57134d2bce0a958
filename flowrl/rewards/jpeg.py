"""JPEG size as a reward: compressibility and incompressibility, the calibration tasks of DDPO
(arXiv 2305.13301).
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from PIL import Image

from flowrl.errors import UserError
from flowrl.rewards.images import to_pictures
from flowrl.rewards.protocol import Images
from flowrl.types import Prompt, RewardOutput
from flowrl.values.bounds import NonZero, Quality


class JPEG:
    """Kilobytes (1000 bytes) of each image as a JPEG of `quality`, times `scale`; the prompt does
    not matter.

    flow_grpo's incompressibility has scale 1, its compressibility -1/500. Part: kilobytes.
    """

    def __init__(self, *, quality: Quality, scale: NonZero) -> None:
        if not 1 <= quality <= 100:
            raise UserError(f"reward.quality={quality} must be from 1 to 100")
        if scale == 0:
            raise UserError(
                "reward.scale=0 gives every image the same reward; it must differ from 0"
            )
        self.quality = quality
        self.scale = scale

    part_names = ("kilobytes",)

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        kilobytes = torch.tensor([self._size(picture) / 1000 for picture in to_pictures(images)])
        everywhere = torch.ones(len(prompts), dtype=torch.bool)
        return RewardOutput(kilobytes * self.scale, everywhere, {"kilobytes": kilobytes})

    def _size(self, picture: Image.Image) -> int:
        file = io.BytesIO()
        picture.save(file, format="JPEG", quality=self.quality)
        return file.tell()
