"""The LAION aesthetic predictor is a linear probe, written as layers, on CLIP's image features."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from flowrl.errors import UserError
from flowrl.rewards.clip import CLIP
from flowrl.rewards.loading import load_weights
from flowrl.rewards.outputs import all_valid
from flowrl.rewards.protocol import Images
from flowrl.types import Prompt, RewardOutput
from flowrl.values.bounds import Count, Dtype, Text

WIDTHS = (1024, 128, 64, 16, 1)
"""Outputs of the predictor's linear layers (christophschuhmann/improved-aesthetic-predictor)."""


class Aesthetic(CLIP):
    """The predictor's raw score, about 1 to 10, of the unit image features; the prompt does not
    matter.

    CLIP is OpenAI's ViT-L/14, the predictor `sac+logos+ava1-l14-linearMSE.pth`: five linear layers
    without activations between them. `weights` is its file, a local path or ORG/NAME/FILE on the
    hub.
    """

    def __init__(
        self,
        *,
        pretrained: Text,
        processor: Text,
        dtype: Dtype,
        batch_size: Count,
        weights: Text,
    ) -> None:
        super().__init__(
            pretrained=pretrained,
            processor=processor,
            dtype=dtype,
            batch_size=batch_size,
        )
        state = load_weights(weights, "weights")
        # The published file numbers its layers with three dropouts among them, which do nothing at
        # inference.
        self.layers = nn.ModuleDict()
        width = self.model.config.projection_dim
        for number, width_next in zip((0, 2, 4, 6, 7), WIDTHS, strict=True):
            self.layers[str(number)] = nn.Linear(width, width_next)
            width = width_next
        layers = {name.removeprefix("layers."): value for name, value in state.items()}
        try:
            self.layers.load_state_dict(layers)
        except RuntimeError as error:
            raise UserError(
                f"reward.weights={weights}: not the aesthetic predictor for features of "
                f"{self.model.config.projection_dim} dimensions; give "
                "sac+logos+ava1-l14-linearMSE.pth with CLIP ViT-L/14"
            ) from error

    part_names = ()

    def forward(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        return all_valid(self._predict(self.image_features(images)).cpu())

    def score_with_graph(
        self, images: Float[Tensor, "B 3 H W"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, "B"]:
        return self._predict(self.image_features_with_graph(images))

    def _predict(self, features: Float[Tensor, "B D"]) -> Float[Tensor, "B"]:
        """Return the predictor's score of features of length 1, as in its training."""
        for layer in self.layers.values():
            features = layer(features)
        return features[:, 0]
