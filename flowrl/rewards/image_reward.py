"""ImageReward v1.0 (arXiv 2304.05977): BLIP's text encoder attending to the image, and a head on
its first token.

The published package pins releases of timm and transformers that no longer install beside current
ones. The network is BLIP's own, which transformers has, so the published checkpoint is loaded into
that instead.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchvision.transforms import (
    CenterCrop,
    Compose,
    InterpolationMode,
    Normalize,
    Resize,
    ToTensor,
)
from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig, BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from flowrl.errors import UserError
from flowrl.rewards.images import to_pictures
from flowrl.rewards.loading import dtype_of, load_pretrained, load_weights
from flowrl.rewards.protocol import Images
from flowrl.types import Prompt, RewardOutput
from flowrl.values.bounds import Count, Dtype, Text

MEAN = 0.16717362830052426
STD = 1.0333394966054072
"""Of the raw reward over the authors' data: the published score is standardised by them."""
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

    def __init__(self, *, weights: Text, tokenizer: Text, dtype: Dtype, batch_size: Count) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"reward.batch_size={batch_size} must be at least 1")
        state = load_weights(weights, "weights")
        try:
            vision = _below(state, "blip.visual_encoder.")
            text = _below(state, "blip.text_encoder.")
            self.vision = _vision_tower(vision)
            self.text = _text_tower(text)
            self.head = nn.ModuleDict(
                {
                    name: nn.Linear(value.shape[1], len(value))
                    for name, value in _head_weights(state).items()
                }
            )
            self.head.load_state_dict(_below(state, "mlp.layers."))
        except (KeyError, RuntimeError) as error:
            raise UserError(
                f"reward.weights={weights}: not a checkpoint of ImageReward v1.0"
            ) from error
        towers: list[nn.Module] = [self.vision, self.text]
        for tower in towers:
            tower.to(dtype_of(dtype))
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
        for start in range(0, len(pictures), self.batch_size):
            rows = slice(start, start + self.batch_size)
            scores.append(self._score(pictures[rows], [prompt.text for prompt in prompts[rows]]))
        return RewardOutput(torch.cat(scores).cpu(), torch.ones(len(prompts), dtype=torch.bool))

    def _score(self, pictures: Sequence[object], texts: list[str]) -> Tensor:
        first = next(self.vision.parameters())
        pixels = torch.stack([self.preprocess(picture) for picture in pictures]).to(first)
        tokens = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(first.device)
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read = (
            self.text(
                input_ids=tokens["input_ids"],
                attention_mask=tokens["attention_mask"],
                encoder_hidden_states=seen,
                is_decoder=False,
            )
            .last_hidden_state[:, 0]
            .float()
        )
        for layer in self.head.values():
            read = layer(read)
        return (read[:, 0] - MEAN) / STD


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
    }


def _head_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The head's matrices by their number in the published file, which counts dropouts too."""
    own = _below(state, "mlp.layers.")
    numbers = sorted({name.split(".")[0] for name in own}, key=int)
    if not numbers:
        raise KeyError("mlp.layers")
    return {number: own[f"{number}.weight"] for number in numbers}


def _vision_tower(state: dict[str, Tensor]) -> BlipVisionModel:
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
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
    vocabulary, width = state["embeddings.word_embeddings.weight"].shape
    config = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=state["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=len(state["encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=sum(name.endswith("intermediate.dense.weight") for name in state),
        num_attention_heads=width // HEAD_WIDTH,
        max_position_embeddings=len(state["embeddings.position_embeddings.weight"]),
        layer_norm_eps=1e-12,
        is_decoder=True,  # which gives it the cross-attention; it is called without the causal mask
    )
    tower = BlipTextModel(config, add_pooling_layer=False)
    state.pop("embeddings.position_ids", None)
    tower.load_state_dict(state)
    return tower
