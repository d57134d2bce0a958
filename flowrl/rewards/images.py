"""All scorers see 8-bit RGB pictures, so that tensors and pictures give the same number."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from flowrl.errors import UserError
from flowrl.images.pictures import to_rgb
from flowrl.rewards.protocol import Images


def to_pictures(images: Images) -> list[Image.Image]:
    """Return RGB pictures; tensors (B 3 H W) are clamped to [0, 1] and rounded to 8 bits, and
    pictures of other modes converted. Raises UserError for NaN.

    Scorers never see NaN: `flowrl.training.reward` leaves such images out.
    """
    if not isinstance(images, Tensor):
        return [to_rgb(image) for image in images]
    if images.isnan().any():
        raise UserError("images hold NaN")
    # In float32, since a product in 16 bits would be rounded twice.
    clamped = images.detach().float().clamp(0, 1)
    levels = (clamped * 255).round().byte()
    arrays = levels.permute(0, 2, 3, 1).cpu().numpy()  # [B, H, W, 3]
    return [Image.fromarray(pixels) for pixels in arrays]


def to_tensor(images: Images) -> Float[Tensor, "B 3 H W"]:
    """Return float images in [0, 1] on the CPU, all of one size; tensors are rounded to 8 bits as
    pictures are.
    """
    levels = [pil_to_tensor(picture) for picture in to_pictures(images)]
    return torch.stack(levels).float() / 255


def batches(count: int, size: int) -> Iterator[slice]:
    """Cut `count` samples into consecutive batches of up to `size`; yield their rows."""
    for start in range(0, count, size):
        yield slice(start, start + size)
