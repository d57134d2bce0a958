"""Small random pipelines of each family, saved in diffusers layout, and how the tests configure
runs on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline, FluxPipeline, StableDiffusion3Pipeline
from families.family import save
from families.released import flux1, flux2_dev, flux2_klein, sd3
from torch.nn import functional

from flowrl.models.flux2 import denormalise

VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (8, 8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
}
SMALL = {"num_attention_heads": 2, "attention_head_dim": 16}
FLUX2 = SMALL | {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "joint_attention_dim": 48,
    "axes_dims_rope": (4, 4, 4, 4),
    "timestep_guidance_channels": 16,
}
SIDE, PIXELS = 8, 8
"""Latents a side of 32x32 images, and pixels a side of a token of 2x2 patches of latents."""


def patches(x: torch.Tensor) -> torch.Tensor:
    """Latents with 2x2 patches in their channels."""
    return functional.pixel_unshuffle(x, 2)


def tokens(x: torch.Tensor) -> torch.Tensor:
    """Latents as a sequence of 2x2 patches."""
    return patches(x).flatten(2).transpose(1, 2)


@dataclass(frozen=True)
class Family:
    """All that the tests know of a family of base models: a `model` option, its small pipeline, its
    stock class.

    `noise` gives FlowRL's initial noise as the stock pipeline takes it, `latents` the last latents,
    with the autoencoder, as it gives them. `arguments` are those of a stock call of so many steps
    that FlowRL's own grid needs.
    """

    option: str
    build: Callable[[Mapping[str, Any], Mapping[str, Any]], Any]
    transformer: dict[str, Any]
    stock: type[Any]
    guidance: float  # a scale above 1
    noise: Callable[[torch.Tensor], torch.Tensor]
    latents: Callable[[torch.Tensor, Any], torch.Tensor]
    arguments: Callable[[int], dict[str, Any]] = field(default=lambda steps: {})
    length: int = 80  # of a text in tokens, which are characters
    has_negative: bool = False  # prompt, embedded beside the others
    num_idle: int = 0  # layers with LoRA whose output the transformer never uses
    repeats: bool = (
        False  # another family's network, so that what costs time is left to the slow tests
    )

    def save(self, folder: Path) -> Path:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            save(self.build(self.transformer, VAE), folder, torch.float32)
        return folder

    def overrides(self, folder: Path, size: tuple[int, int] = (32, 32)) -> list[str]:
        """A run on the small pipeline, in float32, that keeps the model's own recipe otherwise;
        images are of this height and width.
        """
        height, width = size
        resolution = height if height == width else list(size)
        return [
            f"model={self.option}",
            f"model.pretrained={folder}",
            "model.dtype=float32",
            f"model.resolution={resolution}",
            f"model.max_sequence_length={self.length}",
            f"grid.tokens={(height // PIXELS) * (width // PIXELS)}",
            "lora.rank=4",
            "rollout.num_steps=4",
            "rollout.trained={count: 2, low: 0, high: 3}",
            "data.prompts.count=8",
            "embeddings.folder=null",
            "num_threads=1",
            "gate_tolerance=0",
        ]


FAMILIES = {
    "sd3": Family(
        "sd35_medium",
        sd3,
        SMALL
        | {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "joint_attention_dim": 32,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 32,
            "pos_embed_max_size": 16,
            "qk_norm": "rms_norm",
            "dual_attention_layers": (0,),
        },
        StableDiffusion3Pipeline,
        guidance=4.5,
        noise=lambda x: x,
        latents=lambda x0, _: x0,
        arguments=lambda steps: {
            "sigmas": [(steps - k) / steps for k in range(steps)]
        },  # linear_shift's
        has_negative=True,
        # the last block discards the text stream's attention output, so its text query has no
        # gradient
        num_idle=1,
    ),
    "flux1": Family(
        "flux1_dev",
        flux1,
        SMALL
        | {
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 16,
            "axes_dims_rope": (4, 6, 6),
            "guidance_embeds": True,
        },
        FluxPipeline,
        guidance=3.5,
        noise=tokens,
        latents=lambda x0, _: tokens(x0),
    ),
    "flux2_klein": Family(
        "flux2_klein_base_4b",
        flux2_klein,
        FLUX2 | {"guidance_embeds": False},
        Flux2KleinPipeline,
        guidance=4.0,
        noise=patches,
        latents=denormalise,  # the autoencoder's own
        has_negative=True,
    ),
    "flux2_dev": Family(
        "flux2_dev",
        flux2_dev,
        FLUX2 | {"guidance_embeds": True},
        Flux2Pipeline,
        guidance=2.5,
        noise=patches,
        latents=lambda x0, _: tokens(x0),
        length=320,
        repeats=True,  # klein's: its text and its guidance are its own
    ),
}
