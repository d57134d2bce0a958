"""CLIP of transformers, with its processor, gives normalised features of images and texts to the
scorers built on it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize
from torchvision.transforms.functional import center_crop
from transformers import CLIPModel, CLIPProcessor

from flowrl.models.weights import DTYPES
from flowrl.rewards.differentiable import normalise, resize
from flowrl.rewards.images import batches, to_pictures
from flowrl.rewards.loading import load_pretrained
from flowrl.rewards.protocol import Images
from flowrl.values.bounds import Count, Dtype, Text
from flowrl.values.check import checked


class CLIP(nn.Module):
    """A CLIP network: `pretrained` and `processor` are local folders or hub ids, and `batch_size`
    images go through the network at once.

    Features are unit vectors in float32, whatever `dtype` the network computes in, so that a cosine
    is their product. Raises UserError where either cannot be loaded.
    """

    only_computes = True
    place = ""
    """Where its keys stand below `reward`, with a dot at the end, for errors."""

    @checked("reward")
    def __init__(
        self,
        *,
        pretrained: Text,
        processor: Text,
        dtype: Dtype,
        batch_size: Count,
    ) -> None:
        super().__init__()
        self.model = load_pretrained(
            CLIPModel,
            pretrained,
            f"{self.place}pretrained",
            dtype=DTYPES[dtype],
        )
        self.processor = load_pretrained(CLIPProcessor, processor, f"{self.place}processor")
        self.batch_size = batch_size

    @property
    def scale(self) -> Tensor:
        """Return exp(logit_scale), about 100 in the published weights."""
        return self.model.logit_scale.float().exp()

    def image_features(self, images: Images) -> Float[Tensor, "B D"]:
        """Return unit vectors of the images, float32, on the network's device."""
        # CLIP's processor resizes and crops pictures of any size to the network's.
        process = self.processor.image_processor
        pictures = to_pictures(images)
        features = []
        for rows in batches(len(pictures), self.batch_size):
            inputs = process(pictures[rows], return_tensors="pt")
            features.append(self._features(inputs["pixel_values"]))
        return torch.cat(features)

    def image_features_with_graph(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """Return unit vectors of images in [0, 1] with a graph that leads to them; they are
        prepared as the processor does it, but for its rounding to 8 bits.
        """
        features = []
        for rows in batches(len(images), self.batch_size):
            features.append(self._features(self._prepare(images[rows])))
        return torch.cat(features)

    def _prepare(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 S S"]:
        """Resize, crop and normalise images as the processor's settings say."""
        settings = self.processor.image_processor
        pixels = resize(images.float(), settings.size["shortest_edge"])
        crop = settings.crop_size
        pixels = center_crop(pixels, [crop["height"], crop["width"]])
        return normalise(pixels, settings.image_mean, settings.image_std)

    def _features(self, pixels: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B D"]:
        """Return unit vectors of prepared images."""
        pixels = pixels.to(self.model.device, self.model.dtype)
        output = self.model.get_image_features(pixel_values=pixels)
        # With the projection: [B, D]. Norms are taken in float32, whatever dtype the network
        # computes in.
        return normalize(output.pooler_output.float(), dim=-1)

    def text_features(self, texts: Sequence[str]) -> Float[Tensor, "B D"]:
        """Return unit vectors of the texts, cut at the model's length (77 tokens); equal texts are
        encoded once.
        """
        unique = sorted(set(texts))
        tokens = self.processor.tokenizer(
            unique,
            padding="max_length",
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.model.device)
        output = self.model.get_text_features(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
        )
        features = normalize(output.pooler_output.float(), dim=-1)
        # Back from one row a text to one row a sample.
        row_of = {text: row for row, text in enumerate(unique)}
        rows = [row_of[text] for text in texts]
        return features[rows]
