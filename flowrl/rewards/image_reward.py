"""ImageReward v1.0 (arXiv 2304.05977) is BLIP's text encoder attending to the image, and a head on
its first token.

The published package pins releases of timm and transformers that no longer install beside current
ones. The network is BLIP's own, which transformers has, so the published checkpoint is loaded into
that instead.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.transforms import (
    CenterCrop,
    Compose,
    InterpolationMode,
    Normalize,
    Resize,
    ToTensor,
)
from torchvision.transforms.functional import center_crop
from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig, BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from flowrl.errors import UserError
from flowrl.models.weights import DTYPES
from flowrl.rewards.differentiable import normalise, resize
from flowrl.rewards.images import batches, to_pictures
from flowrl.rewards.loading import load_pretrained, load_weights
from flowrl.rewards.outputs import all_valid
from flowrl.rewards.protocol import Images
from flowrl.types import Prompt, RewardOutput
from flowrl.values.bounds import Count, Dtype, Text
from flowrl.values.check import checked
from flowrl.values.named import below

MEAN = 0.16717362830052426
STD = 1.0333394966054072
"""Mean and standard deviation of the raw reward over the authors' data, by which the published
score is standardised.
"""
MAX_TOKENS = 35
HEAD_WIDTH = 64
"""Width of one attention head, in both towers."""
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)

_VISION_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"^norm\.", "post_layernorm."),
)
"""The checkpoint's names in the image tower, and BLIP's in transformers; the text tower's are the
same.
"""


class ImageReward(nn.Module):
    """The standardised score, mostly -2 to 2, each image against its own prompt (never the list
    interface's N x N).

    `weights` is ImageReward.pt, a local path or ORG/NAME/FILE on the hub; sizes of the towers are
    read off it. `tokenizer` is bert-base-uncased's folder or hub id. Prompts are cut at 35 tokens,
    as published.
    """

    only_computes = True

    @checked("reward")
    def __init__(
        self,
        *,
        weights: Text,
        tokenizer: Text,
        dtype: Dtype,
        batch_size: Count,
    ) -> None:
        super().__init__()
        state = load_weights(weights, "weights")
        try:
            self.vision = _vision_tower(below(state, "blip.visual_encoder."))
            self.text = _text_tower(below(state, "blip.text_encoder."))
            self.head = _head(below(state, "mlp.layers."))
        except (KeyError, RuntimeError) as error:
            raise UserError(
                f"reward.weights={weights}: not a checkpoint of ImageReward v1.0"
            ) from error
        towers: list[nn.Module] = [self.vision, self.text]
        for tower in towers:
            tower.to(DTYPES[dtype])
        self.tokenizer = load_pretrained(BertTokenizer, tokenizer, "tokenizer")
        side = self.vision.config.image_size
        steps = [
            Resize(side, InterpolationMode.BICUBIC),
            CenterCrop(side),
            ToTensor(),
            Normalize(PIXEL_MEAN, PIXEL_STD),
        ]
        self.preprocess = Compose(steps)
        self.batch_size = batch_size

    part_names = ()

    def forward(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        pictures = to_pictures(images)
        scores = []
        for rows in batches(len(pictures), self.batch_size):
            texts = [prompt.text for prompt in prompts[rows]]
            pixels = torch.stack([self.preprocess(picture) for picture in pictures[rows]])
            scores.append(self._score(pixels, texts))
        return all_valid(torch.cat(scores).cpu())

    def score_with_graph(
        self, images: Float[Tensor, "B 3 H W"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, "B"]:
        side = self.vision.config.image_size
        scores = []
        for rows in batches(len(prompts), self.batch_size):
            pixels = center_crop(resize(images[rows].float(), side), [side, side])
            texts = [prompt.text for prompt in prompts[rows]]
            scores.append(self._score(normalise(pixels, PIXEL_MEAN, PIXEL_STD), texts))
        return torch.cat(scores)

    def _score(self, pixels: Float[Tensor, "B 3 S S"], texts: list[str]) -> Float[Tensor, "B"]:
        """Return the standardised scores of one batch of prepared images."""
        weight = next(self.vision.parameters())
        pixels = pixels.to(weight)
        tokens = self.tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        ).to(weight.device)
        image_states = self.vision(pixel_values=pixels).last_hidden_state
        # Every text token attends to all text tokens and, in the cross-attention, to the image.
        text_states = self.text(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=image_states,
            is_decoder=False,
        ).last_hidden_state
        # BLIP reads a pair of image and text out at the first token. The head's dropouts do nothing
        # at inference, and it has no activations.
        hidden = text_states[:, 0].float()
        for layer in self.head.values():
            hidden = layer(hidden)
        return (hidden[:, 0] - MEAN) / STD


def _head(state: dict[str, Tensor]) -> nn.ModuleDict:
    """Build the head's linear layers, named by their numbers in the published file, which counts
    dropouts too.
    """
    numbers = {name.split(".")[0] for name in state}
    if not numbers:
        raise KeyError("mlp.layers")
    head = nn.ModuleDict()
    for number in sorted(numbers, key=int):
        weight = state[f"{number}.weight"]  # [outputs, inputs]
        num_outputs, num_inputs = weight.shape
        head[number] = nn.Linear(num_inputs, num_outputs)
    head.load_state_dict(state)
    return head


def _vision_tower(state: dict[str, Tensor]) -> BlipVisionModel:
    """Build the image tower, with the sizes of its weights."""
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    # One position a patch of a square image, and one for the class token.
    num_patches = state["pos_embed"].shape[1] - 1
    side = round(num_patches**0.5)
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(state["blocks.0.mlp.fc1.weight"]),
        num_hidden_layers=sum(name.endswith("attn.qkv.weight") for name in state),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=side * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in _VISION_NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    tower = BlipVisionModel(config)
    tower.load_state_dict(renamed)
    return tower


def _text_tower(state: dict[str, Tensor]) -> BlipTextModel:
    """Build the text tower, with the sizes of its weights."""
    vocabulary, width = state["embeddings.word_embeddings.weight"].shape
    # The cross-attention's keys are made of the image tower's states.
    image_width = state["encoder.layer.0.crossattention.self.key.weight"].shape[1]
    config = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=image_width,
        intermediate_size=len(state["encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=sum(name.endswith("intermediate.dense.weight") for name in state),
        num_attention_heads=width // HEAD_WIDTH,
        max_position_embeddings=len(state["embeddings.position_embeddings.weight"]),
        layer_norm_eps=1e-12,
        is_decoder=True,  # which gives it the cross-attention; it is called without the causal mask
    )
    tower = BlipTextModel(config, add_pooling_layer=False)
    # The published checkpoint holds the positions' numbers too, which are no weights.
    state.pop("embeddings.position_ids", None)
    tower.load_state_dict(state)
    return tower
