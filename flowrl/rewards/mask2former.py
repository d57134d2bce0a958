"""Mask2Former of transformers finds objects of COCO's classes, with their masks.

Cheng et al. 2022, arXiv 2112.01527. GenEval's published detector is mmdet's training of the same
network, with a Swin-S, on the same pictures.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

from flowrl.errors import UserError
from flowrl.models.weights import DTYPES
from flowrl.rewards.detection import COCO, Box, Detection
from flowrl.rewards.loading import load_pretrained
from flowrl.values.bounds import Dtype, Side, Text
from flowrl.values.check import checked

LONGEST = 1333 / 800
"""The longer side at most, in shorter sides, as mmdet resizes pictures."""


class Mask2Former(nn.Module):
    """Instances as mmdet reads them: of all pairs of a query and a class the likeliest, as many as
    there are queries.

    A score is the class's probability times the mean probability of the mask's pixels. The mask
    holds the pixels likelier than 1/2, and the box is the mask's. Pictures are enlarged until the
    shorter side has `shorter_side` pixels, 800 as published, and go through the network one by one.
    `pretrained` is a local folder or a hub id, at `revision` of its history, null the newest.
    Scores are of the published kind, but the weights are another training's.

    Raises UserError for a network of other classes than COCO's 80, such as a panoptic one.
    """

    @checked("reward.detector")
    def __init__(
        self, *, pretrained: Text, revision: Text | None, shorter_side: Side, dtype: Dtype
    ) -> None:
        super().__init__()
        key = "detector.pretrained"
        self.model = load_pretrained(
            Mask2FormerForUniversalSegmentation,
            pretrained,
            key,
            revision=revision,
            dtype=DTYPES[dtype],
        )
        num_classes = self.model.config.num_labels
        if num_classes != len(COCO):
            raise UserError(
                f"reward.{key}={pretrained}: knows {num_classes} classes and not COCO's "
                f"{len(COCO)}; give an instance segmentation of COCO"
            )
        self.process = load_pretrained(AutoImageProcessor, pretrained, key, revision=revision)
        self.size = {"shortest_edge": shorter_side, "longest_edge": round(LONGEST * shorter_side)}
        self.names = COCO

    def forward(self, pictures: Sequence[Image.Image], min_score: float) -> list[list[Detection]]:
        found = []
        for picture in pictures:
            inputs = self.process(images=picture, size=self.size, return_tensors="pt")
            pixels = inputs["pixel_values"].to(self.model.device, self.model.dtype)
            output = self.model(pixel_values=pixels)
            probabilities = output.class_queries_logits[0].float().softmax(-1)
            masks = output.masks_queries_logits[0].float()
            # The last class is that of queries without an object.
            found.append(_instances(probabilities[:, :-1], masks, picture, min_score))
        return found


def _instances(
    probabilities: Float[Tensor, "Q C"],
    masks: Float[Tensor, "Q h w"],
    picture: Image.Image,
    min_score: float,
) -> list[Detection]:
    """Read the instances with a score above `min_score` from the classes' probabilities and the
    masks' logits, which are enlarged to the picture.
    """
    num_queries, num_classes = probabilities.shape
    likeliest, pairs = probabilities.flatten().topk(num_queries)
    # No mask makes a score larger, so that the others need not be enlarged.
    is_candidate = likeliest > min_score
    pairs = pairs[is_candidate]
    detections: list[Detection] = []
    if not len(pairs):
        return detections
    size = (picture.height, picture.width)
    enlarged = interpolate(masks[pairs // num_classes][None], size, mode="bilinear")[0]
    on = enlarged > 0
    certainty = (enlarged.sigmoid() * on).sum((1, 2)) / on.sum((1, 2)).clamp(min=1)
    scores = (likeliest[is_candidate] * certainty).tolist()
    classes = (pairs % num_classes).tolist()
    for score, number, mask in zip(scores, classes, on.cpu(), strict=True):
        if score > min_score:
            detections.append(Detection(COCO[number], score, _box(mask), mask.numpy()))
    return detections


def _box(mask: Bool[Tensor, "H W"]) -> Box:
    """Return the box around a mask that is not empty, its right and bottom after the last pixel."""
    columns = mask.any(0).nonzero().flatten()
    rows = mask.any(1).nonzero().flatten()
    return (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
