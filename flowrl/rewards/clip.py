"""CLIP of transformers with its processor: normalised features of images and texts, for the scorers
built on it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import CLIPModel, CLIPProcessor

from flowrl.errors import UserError
from flowrl.rewards.images import to_pictures
from flowrl.rewards.loading import dtype_of, load_pretrained
from flowrl.rewards.protocol import Images
from flowrl.values.bounds import Count, Dtype, Text


class CLIP(nn.Module):
    """`pretrained` and `processor` are local folders or hub ids; `batch_size` images go through the
    network at once.
    """

    def __init__(
        self, *, pretrained: Text, processor: Text, dtype: Dtype, batch_size: Count
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"reward.batch_size={batch_size} must be at least 1")
        self.model = load_pretrained(CLIPModel, pretrained, "pretrained", dtype=dtype_of(dtype))
        self.processor = load_pretrained(CLIPProcessor, processor, "processor")
        self.batch_size = batch_size

    @property
    def scale(self) -> Tensor:
        """exp(logit_scale), about 100 in the published weights."""
        return self.model.logit_scale.float().exp()

    def image_features(self, images: Images) -> Float[Tensor, "B D"]:
        """Unit vectors of the images, float32."""
        pictures = to_pictures(images)
        features = []
        for start in range(0, len(pictures), self.batch_size):
            batch = pictures[start : start + self.batch_size]
            pixels = self.processor.image_processor(batch, return_tensors="pt")["pixel_values"]
            pixels = pixels.to(self.model.device, self.model.dtype)
            features.append(
                self.model.get_image_features(pixel_values=pixels).pooler_output.float()
            )
        return normalize(torch.cat(features), dim=-1)

    def text_features(self, texts: Sequence[str]) -> Float[Tensor, "B D"]:
        """Unit vectors of the texts, cut at the model's length (77 tokens); equal texts are encoded
        once.
        """
        unique = sorted(set(texts))
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.processor.tokenizer(
            unique, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).to(self.model.device)
        features = self.model.get_text_features(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output.float()
        row = {text: i for i, text in enumerate(unique)}
        return normalize(features, dim=-1)[[row[text] for text in texts]]
