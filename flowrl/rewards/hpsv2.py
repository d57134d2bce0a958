"""Human Preference Score v2.1 (arXiv 2306.09341) is the cosine in a fine-tuned ViT-H/14."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flowrl.errors import UserError
from flowrl.models.weights import DTYPES
from flowrl.rewards.differentiable import fit_inside, normalise
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
        # Those that open_clip's own transform takes, too.
        self.mean = open_clip.OPENAI_DATASET_MEAN
        self.std = open_clip.OPENAI_DATASET_STD
        self.batch_size = batch_size

    part_names = ()

    def forward(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        pictures = to_pictures(images)

        def prepare(rows: slice) -> Tensor:
            return torch.stack([self.preprocess(picture) for picture in pictures[rows]])

        return all_valid(self._cosines(prepare, prompts).cpu())

    def score_with_graph(
        self, images: Float[Tensor, "B 3 H W"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, "B"]:
        side, _ = self.model.visual.image_size

        def prepare(rows: slice) -> Tensor:
            return normalise(fit_inside(images[rows].float(), side), self.mean, self.std)

        return self._cosines(prepare, prompts)

    def _cosines(
        self, prepare: Callable[[slice], Tensor], prompts: Sequence[Prompt]
    ) -> Float[Tensor, "B"]:
        """Return the cosines of all images, in batches; `prepare` gives the pixels of some rows as
        the network takes them, [B, 3, S, S].
        """
        # Each different text is encoded once: a group of samples shares its prompt.
        unique = sorted({prompt.text for prompt in prompts})
        row_of = {text: row for row, text in enumerate(unique)}
        weight = next(self.model.parameters())
        with torch.no_grad():
            tokens = self.tokenize(unique).to(weight.device)
            texts = self.model.encode_text(tokens, normalize=True).float()  # [texts, D]
        cosines = []
        for rows in batches(len(prompts), self.batch_size):
            pixels = prepare(rows).to(weight)
            features = self.model.encode_image(pixels, normalize=True).float()
            text_rows = [row_of[prompt.text] for prompt in prompts[rows]]
            # Both are unit vectors, so their product is the cosine.
            cosines.append((features * texts[text_rows]).sum(-1))
        return torch.cat(cosines)
