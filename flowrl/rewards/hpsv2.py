"""Human Preference Score v2.1 (arXiv 2306.09341) is the cosine in a fine-tuned ViT-H/14."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from flowrl.errors import UserError
from flowrl.models.weights import DTYPES
from flowrl.rewards.images import batches, to_pictures
from flowrl.rewards.loading import load_weights, require
from flowrl.rewards.outputs import all_valid
from flowrl.rewards.protocol import Images
from flowrl.types import Prompt, RewardOutput
from flowrl.values.bounds import Count, Dtype, Text
from flowrl.values.check import checked


class HPSv2(nn.Module):
    """cos(image, text), about 0.2 to 0.4, each image against its own prompt.

    `weights` is the checkpoint, a local path or ORG/NAME/FILE on the hub, for open_clip's
    `architecture`. As in the hpsv2 package, an image's longer side is resized and the rest padded,
    where CLIP crops. That package computes under autocast to float16; in float32 the score differs
    by its rounding. Needs the extra `clip`.

    Raises UserError for an architecture that open_clip does not know, and for weights that cannot
    be read or belong to another one.
    """

    @checked("reward")
    def __init__(
        self,
        *,
        architecture: Text,
        weights: Text,
        dtype: Dtype,
        batch_size: Count,
    ) -> None:
        super().__init__()
        open_clip = require("open_clip", "clip")
        if architecture not in open_clip.list_models():
            raise UserError(
                f"reward.architecture={architecture!r}: no architecture of open_clip; the "
                "published is ViT-H-14"
            )
        state = load_weights(weights, "weights")
        self.model = open_clip.create_model(architecture, pretrained=None)
        try:
            self.model.load_state_dict(state)
        except RuntimeError as error:
            raise UserError(
                f"reward.weights={weights}: not the weights of reward.architecture={architecture}"
            ) from error
        self.model.to(DTYPES[dtype])
        self.tokenize = open_clip.get_tokenizer(architecture)
        self.preprocess = open_clip.image_transform(
            self.model.visual.image_size,
            is_train=False,
            resize_mode="longest",
        )
        self.batch_size = batch_size

    part_names = ()

    def forward(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        # Each different text is encoded once: a group of samples shares its prompt.
        unique = sorted({prompt.text for prompt in prompts})
        row_of = {text: row for row, text in enumerate(unique)}
        weight = next(self.model.parameters())
        tokens = self.tokenize(unique).to(weight.device)
        texts = self.model.encode_text(tokens, normalize=True).float()  # [texts, D]
        pictures = to_pictures(images)
        cosines = []
        for rows in batches(len(pictures), self.batch_size):
            preprocessed = [self.preprocess(picture) for picture in pictures[rows]]
            pixels = torch.stack(preprocessed).to(weight)  # [B, 3, S, S]
            features = self.model.encode_image(pixels, normalize=True).float()
            text_rows = [row_of[prompt.text] for prompt in prompts[rows]]
            # Both are unit vectors, so their product is the cosine.
            cosine = (features * texts[text_rows]).sum(-1)
            cosines.append(cosine)
        return all_valid(torch.cat(cosines).cpu())
