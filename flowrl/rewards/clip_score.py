"""CLIP score and PickScore are the scaled cosine of image and prompt, in two sets of weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from flowrl.rewards.clip import CLIP
from flowrl.rewards.outputs import all_valid
from flowrl.rewards.protocol import Images
from flowrl.types import Prompt, RewardOutput
from flowrl.values.bounds import Count, Dtype, Positive, Text
from flowrl.values.check import checked


class CLIPScore(CLIP):
    """exp(logit_scale) cos(image, text) / `divisor`, each image against its own prompt.

    CLIP score (flow_grpo): OpenAI's ViT-L/14 and divisor 30. PickScore (arXiv 2305.01569,
    flow_grpo): the weights `yuvalkirstain/PickScore_v1`, a fine-tuned ViT-H/14, and divisor 26. The
    divisor only matters in a mixture. Part: cosine.
    """

    @checked("reward")
    def __init__(
        self,
        *,
        pretrained: Text,
        processor: Text,
        dtype: Dtype,
        batch_size: Count,
        divisor: Positive,
    ) -> None:
        super().__init__(
            pretrained=pretrained,
            processor=processor,
            dtype=dtype,
            batch_size=batch_size,
        )
        self.divisor = divisor

    part_names = ("cosine",)

    def forward(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        cosine = self._cosine(self.image_features(images), prompts)
        values = self.scale * cosine / self.divisor
        return all_valid(values.cpu(), {"cosine": cosine.cpu()})

    def score_with_graph(
        self, images: Float[Tensor, "B 3 H W"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, "B"]:
        features = self.image_features_with_graph(images)
        return self.scale * self._cosine(features, prompts) / self.divisor

    def _cosine(
        self, features: Float[Tensor, "B D"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, "B"]:
        """Return the cosine of each image's features and its own prompt's."""
        with torch.no_grad():
            texts = self.text_features([prompt.text for prompt in prompts])
        # Both are unit vectors, so their product is the cosine.
        return (features * texts).sum(-1)
