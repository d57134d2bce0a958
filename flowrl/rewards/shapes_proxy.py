"""A small open_clip model of the shapes world is a learned reward that is only nearly right, for
studies of hacking.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from flowrl.errors import UserError, first_line
from flowrl.rewards.images import to_tensor
from flowrl.rewards.outputs import all_valid
from flowrl.rewards.protocol import Images
from flowrl.runs.files import read_object
from flowrl.shapes.grammar import WORDS
from flowrl.types import Prompt, RewardOutput
from flowrl.values.bounds import Positive, Text
from flowrl.values.check import checked

EMBEDDED = "embedded:"
CONFIG = "shapes_proxy.json"
WEIGHTS = "shapes_proxy.safetensors"
TOKENS = {word: number for number, word in enumerate(dict.fromkeys(WORDS), start=1)}
"""The token of each word of the grammar; 0 fills up."""
END = len(TOKENS) + 1
"""The highest token, where open_clip's text tower is read out."""


class ShapesProxy(nn.Module):
    """exp(logit_scale) cos(image, text) / `divisor`, each image against its own prompt, as
    CLIPScore does it.

    `pretrained` is a folder with the model's open_clip configuration and weights, as
    `scripts/train_proxy.py` writes it, or a shipped one: `embedded:`, or `embedded:weak`, which saw
    so few scenes that it knows little of any other. Raises UserError where there is no such model.

    Words outside the grammar are left out.

    Part: cosine.
    """

    only_computes = True

    @checked("reward")
    def __init__(self, *, pretrained: Text, divisor: Positive) -> None:
        super().__init__()
        folder = Path(pretrained).expanduser()
        if pretrained.startswith(EMBEDDED):
            assets = Path(str(files("flowrl.rewards"))) / "assets"
            folder = assets / pretrained.removeprefix(EMBEDDED)
        # Whatever is wrong with the folder's files, one message tells the remedy.
        try:
            config = read_object(folder / CONFIG, "write it again")
            self.model: Any = build(config)
            # Shipped weights are stored in 16 bits, and computed with in 32.
            stored = load_file(folder / WEIGHTS)
            weights = {name: value.float() for name, value in stored.items()}
            self.model.load_state_dict(weights)
        except (OSError, ValueError, SafetensorError, RuntimeError, TypeError) as error:
            reason = first_line(error)
            raise UserError(
                f"reward.pretrained={pretrained}: no proxy there ({reason}); give {EMBEDDED}, "
                f"{EMBEDDED}weak or the folder that scripts/train_proxy.py wrote"
            ) from error
        self.divisor = divisor

    part_names = ("cosine",)

    def forward(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        cosine = self._cosine(to_tensor(images), prompts).cpu()
        scale = self.model.logit_scale.exp().cpu()
        values = scale * cosine / self.divisor
        return all_valid(values, {"cosine": cosine})

    def score_with_graph(
        self, images: Float[Tensor, "B 3 H W"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, "B"]:
        return self.model.logit_scale.exp() * self._cosine(images, prompts) / self.divisor

    def _cosine(
        self, images: Float[Tensor, "B 3 H W"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, "B"]:
        """Return the cosine of each image and its own prompt."""
        pixels = images.to(self.model.logit_scale.device)
        texts = [prompt.text for prompt in prompts]
        tokens = tokenize(texts, self.model.context_length).to(pixels.device)
        # Both are unit vectors, so their product is the cosine.
        image_features = self.model.encode_image(normalised(pixels), normalize=True)
        text_features = self.model.encode_text(tokens, normalize=True)
        return (image_features * text_features).sum(-1)


def build(config: dict[str, Any]) -> nn.Module:
    """Build open_clip's own CLIP of a configuration, with random weights."""
    from open_clip.model import CLIP  # seconds to import, so only where it is used

    return CLIP(**config).eval()


def tokenize(texts: Sequence[str], length: int) -> Int[Tensor, "B L"]:
    """Turn texts into tokens word by word, with the end token, cut and filled up to `length`.

    Words that are not in the grammar are left out.
    """
    most = length - 1  # the end token takes one place
    rows = []
    for text in texts:
        tokens = [TOKENS[word] for word in text.split() if word in TOKENS]
        kept = tokens[:most]
        padding = [0] * (most - len(kept))
        rows.append([*kept, END, *padding])
    return torch.tensor(rows)


def normalised(images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
    """Scale images from [0, 1] to [-1, 1]."""
    return images * 2 - 1
