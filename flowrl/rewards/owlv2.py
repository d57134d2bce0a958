"""OWLv2 of transformers, an open-vocabulary detector, finds objects by the names of their classes.

Minderer et al. 2023, arXiv 2306.09683.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import MinLen
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from transformers import Owlv2ForObjectDetection, Owlv2Processor

from flowrl.models.weights import DTYPES
from flowrl.rewards.detection import COCO, Detection
from flowrl.rewards.images import batches
from flowrl.rewards.loading import load_pretrained
from flowrl.values.bounds import Count, Dtype, Text
from flowrl.values.check import checked

QUERY = "a photo of a {}"
"""The text that asks for a class, as in the model's documentation."""


class OWLv2(nn.Module):
    """A box of each of the image's patches, under the class of `names` whose text fits it best.

    `pretrained` is a local folder or a hub id, at `revision` of its history, null the newest;
    `names` null are COCO's 80 classes. All of them are asked for in every picture, so that what is
    rather a dog is no cat. A score is the sigmoid of a class's logit: published cats of the model's
    documentation have 0.6 and 0.7, so that thresholds for other detectors mean something else here.
    An object is found by several patches, and so needs non-maximum suppression. There are no masks.
    """

    @checked("reward.detector")
    def __init__(
        self,
        *,
        pretrained: Text,
        revision: Text | None,
        names: Annotated[Sequence[Text], MinLen(1)] | None,
        dtype: Dtype,
        batch_size: Count,
    ) -> None:
        super().__init__()
        key = "detector.pretrained"
        self.model = load_pretrained(
            Owlv2ForObjectDetection, pretrained, key, revision=revision, dtype=DTYPES[dtype]
        )
        self.processor = load_pretrained(Owlv2Processor, pretrained, key, revision=revision)
        self.names = COCO if names is None else tuple(names)
        self.batch_size = batch_size

    def forward(self, pictures: Sequence[Image.Image], min_score: float) -> list[list[Detection]]:
        queries = self._queries()
        found: list[list[Detection]] = []
        for rows in batches(len(pictures), self.batch_size):
            scores, classes, boxes = self._predict(pictures[rows], queries)
            for i, picture in enumerate(pictures[rows]):
                # The picture is padded below or on the right to a square, whose side is 1.
                in_pixels = boxes[i] * max(picture.size)
                width_height = in_pixels.new_tensor(picture.size).repeat(2)
                inside = in_pixels.clamp(min=0).minimum(width_height)
                is_there = (inside[:, 2:] > inside[:, :2]).all(-1) & (scores[i] > min_score)
                found.append(
                    self._detections(scores[i][is_there], classes[i][is_there], inside[is_there])
                )
        return found

    def _detections(
        self, scores: Float[Tensor, "N"], classes: Tensor, boxes: Float[Tensor, "N 4"]
    ) -> list[Detection]:
        detections = []
        for score, number, box in zip(
            scores.tolist(), classes.tolist(), boxes.tolist(), strict=True
        ):
            detections.append(Detection(self.names[number], score, tuple(box)))
        return detections

    def _queries(self) -> Float[Tensor, "Q D"]:
        """Return the feature of each class's text."""
        tokens = self.processor.tokenizer(
            [QUERY.format(name) for name in self.names],
            padding="max_length",
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.model.device)
        output = self.model.owlv2.get_text_features(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        )
        return output.pooler_output

    def _predict(
        self, pictures: Sequence[Image.Image], queries: Float[Tensor, "Q D"]
    ) -> tuple[Float[Tensor, "B N"], Tensor, Float[Tensor, "B N 4"]]:
        """Return the best class's score and number, and the box, of each of N patches; boxes hold
        left, top, right and bottom, in sides of the padded square.
        """
        inputs = self.processor.image_processor(list(pictures), return_tensors="pt")
        pixels = inputs["pixel_values"].to(self.model.device, self.model.dtype)
        feature_map = self.model.image_embedder(pixel_values=pixels)[0]  # [B, rows, columns, D]
        features = feature_map.flatten(1, 2)
        every = queries.expand(len(pictures), *queries.shape)
        logits = self.model.class_predictor(features, every)[0]  # [B, N, Q]
        best = logits.float().max(-1)
        centre, size = self.model.box_predictor(features, feature_map).float().split(2, -1)
        boxes = torch.cat([centre - size / 2, centre + size / 2], -1)
        return best.values.sigmoid().cpu(), best.indices.cpu(), boxes.cpu()
