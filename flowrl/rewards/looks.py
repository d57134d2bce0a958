"""Features of images, by rules or by CLIP, which explain the votes on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flowrl.images.image_statistics import panel
from flowrl.rewards.clip import CLIP
from flowrl.rewards.images import to_pictures, to_tensor
from flowrl.rewards.protocol import Images
from flowrl.types import Prompt


class Features(Protocol):
    """A callable that describes each image, beside its prompt, by D numbers, whatever the others
    are.
    """

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Float[Tensor, "B D"]: ...


class Statistics(nn.Module):
    """Nine statistics of an image's pixels: means and standard deviations of red, green and blue,
    and of the hacking panel (`flowrl.images.image_statistics`) the density of edges, the entropy of
    colours and the share of high frequencies. The prompt does not matter.

    They are enough for tastes in colour and texture, and know nothing of what a picture shows.
    """

    def __init__(self) -> None:
        super().__init__()

    def forward(self, images: Images, prompts: Sequence[Prompt]) -> Float[Tensor, "B 9"]:
        return torch.stack([self._describe(picture) for picture in to_pictures(images)])

    def _describe(self, picture: object) -> Float[Tensor, "9"]:
        """Describe one picture by itself, since those of a batch may differ in size."""
        pixels = to_tensor([picture])  # type: ignore[list-item]
        colours = pixels.flatten(2)  # [1, 3, H W]
        looks = panel(pixels)
        others = [looks[name] for name in ("edge_density", "colour_entropy", "high_frequency")]
        spreads = colours.std(2, correction=0)
        return torch.cat([colours.mean(2)[0], spreads[0], *others])


class CLIPFeatures(CLIP):
    """The unit vector of an image under CLIP, and its cosine with that of the image's prompt.

    Linear scores of the vector express tastes in style and content, as the LAION aesthetic
    predictor's are; the cosine lets votes for the picture that follows its prompt count as such.
    """

    place = "features."

    def forward(self, images: Images, prompts: Sequence[Prompt]) -> Float[Tensor, "B D"]:
        features = self.image_features(images)
        texts = self.text_features([prompt.text for prompt in prompts])
        # Both are unit vectors, so their product is the cosine.
        return torch.cat([features, (features * texts).sum(-1, keepdim=True)], 1)
