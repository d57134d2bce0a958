"""CLIP of transformers, with its processor, gives normalised features of images and texts to the
scorers built on it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import CLIPModel, CLIPProcessor

from flowrl.models.weights import DTYPES
from flowrl.rewards.images import batches, to_pictures
from flowrl.rewards.loading import load_pretrained
from flowrl.rewards.protocol import Images
from flowrl.values.bounds import Count, Dtype, Text
from flowrl.values.check import checked


class CLIP(nn.Module):
    """A CLIP network: `pretrained` and `processor` are local folders or hub ids, and `batch_size`
    images go through the network at once.
    """

    @checked("reward")
    def __init__(
        self, *, pretrained: Text, processor: Text, dtype: Dtype, batch_size: Count
    ) -> None:
        super().__init__()
        self.model = load_pretrained(CLIPModel, pretrained, "pretrained", dtype=DTYPES[dtype])
        self.processor = load_pretrained(CLIPProcessor, processor, "processor")
        self.batch_size = batch_size

    @property
    def scale(self) -> Tensor:
        """Return exp(logit_scale), about 100 in the published weights."""
        return self.model.logit_scale.float().exp()

    def image_features(self, images: Images) -> Float[Tensor, "B D"]:
        """Return unit vectors of the images, float32."""
        pictures = to_pictures(images)
        features = []
        for rows in batches(len(pictures), self.batch_size):
            inputs = self.processor.image_processor(pictures[rows], return_tensors="pt")
            pixels = inputs["pixel_values"].to(self.model.device, self.model.dtype)
            output = self.model.get_image_features(pixel_values=pixels)
            features.append(output.pooler_output.float())
        return normalize(torch.cat(features), dim=-1)

    def text_features(self, texts: Sequence[str]) -> Float[Tensor, "B D"]:
        """Return unit vectors of the texts, cut at the model's length (77 tokens); equal texts are
        encoded once.
        """
        unique = sorted(set(texts))
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.processor.tokenizer(
            unique, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).to(self.model.device)
        features = self.model.get_text_features(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output.float()
        row_of = {text: row for row, text in enumerate(unique)}
        return normalize(features, dim=-1)[[row_of[text] for text in texts]]
