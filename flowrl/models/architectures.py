"""The transformers of the released models by hub id: what they are made of, for tests and plans
without weights.

Arguments beyond the classes' defaults, as in the `transformer/config.json` of each repository.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
)
from torch import nn

from flowrl.errors import UserError

SD35 = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "qk_norm": "rms_norm",
}
MEDIUM = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
}
LARGE = {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
}
KLEIN_4B = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
KLEIN_9B = {
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
    "guidance_embeds": False,
}
ARCHITECTURES: Mapping[str, tuple[type[Any], Mapping[str, Any]]] = {
    "stabilityai/stable-diffusion-3.5-medium": (SD3Transformer2DModel, SD35 | MEDIUM),
    "stabilityai/stable-diffusion-3.5-large": (SD3Transformer2DModel, SD35 | LARGE),
    "black-forest-labs/FLUX.1-dev": (FluxTransformer2DModel, {"guidance_embeds": True}),
    "black-forest-labs/FLUX.2-klein-base-4B": (Flux2Transformer2DModel, KLEIN_4B),
    "black-forest-labs/FLUX.2-klein-4B": (Flux2Transformer2DModel, KLEIN_4B),
    "black-forest-labs/FLUX.2-klein-base-9B": (Flux2Transformer2DModel, KLEIN_9B),
    "black-forest-labs/FLUX.2-klein-9B": (Flux2Transformer2DModel, KLEIN_9B),
    "black-forest-labs/FLUX.2-dev": (Flux2Transformer2DModel, {}),
}

CLIP_L = 123_000_000
CLIP_G = 695_000_000
T5_XXL = 4_760_000_000
QWEN3_4B = 4_020_000_000
QWEN3_8B = 8_190_000_000
MISTRAL3_24B = 24_010_000_000

TEXT_PARAMETERS: Mapping[str, int] = {
    "stabilityai/stable-diffusion-3.5-medium": CLIP_L + CLIP_G + T5_XXL,
    "stabilityai/stable-diffusion-3.5-large": CLIP_L + CLIP_G + T5_XXL,
    "black-forest-labs/FLUX.1-dev": CLIP_L + T5_XXL,
    "black-forest-labs/FLUX.2-klein-base-4B": QWEN3_4B,
    "black-forest-labs/FLUX.2-klein-4B": QWEN3_4B,
    "black-forest-labs/FLUX.2-klein-base-9B": QWEN3_8B,
    "black-forest-labs/FLUX.2-klein-9B": QWEN3_8B,
    "black-forest-labs/FLUX.2-dev": MISTRAL3_24B,
}
"""Parameters of a model's text encoders, rounded, by the model's name on the hub."""

AUTOENCODER = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "norm_num_groups": 32,
}
"""The released autoencoders' size, in all families; they differ in their latent channels."""

SCALING = {
    "scaling_factor": 1.5,
    "shift_factor": 0.06,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
"""SD3's and FLUX.1's autoencoders scale and shift their latents; the numbers matter to images
alone.
"""

AUTOENCODERS: Mapping[type[Any], tuple[type[Any], Mapping[str, Any], int]] = {
    SD3Transformer2DModel: (AutoencoderKL, SCALING, 1),
    FluxTransformer2DModel: (AutoencoderKL, SCALING, 4),
    Flux2Transformer2DModel: (AutoencoderKLFlux2, {}, 4),
}
"""By transformer: its autoencoder's class and arguments beyond the above, and how many latents its
pipeline packs into one token's channels.
"""


def is_listed(pretrained: str) -> bool:
    """Tell whether `on_meta` knows the transformer of a released model or of a local folder; that
    of a derived model may be of any class.
    """
    folder = Path(pretrained, "transformer")
    if not folder.is_dir():
        return pretrained in ARCHITECTURES
    name = SD3Transformer2DModel.load_config(folder).get("_class_name")
    return name in {kind.__name__ for kind in AUTOENCODERS}


def on_meta(pretrained: str, dtype: torch.dtype) -> nn.Module:
    """Make the transformer of a released model or of a local folder, without its weights.

    Raises UserError for a hub id that is not listed, and for a folder's transformer of another
    class.
    """
    folder = Path(pretrained, "transformer")
    with torch.device("meta"):
        if folder.is_dir():
            kinds = {kind.__name__: kind for kind in AUTOENCODERS}
            # Any class of diffusers reads a configuration alike; it is asked which one it is of.
            config = SD3Transformer2DModel.load_config(folder)
            name = config.get("_class_name")
            if name not in kinds:
                raise UserError(f"{folder} holds a {name}; known are {', '.join(kinds)}")
            return _cast(kinds[name].from_config(config), dtype)
        if pretrained not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise UserError(
                f"{pretrained}: unknown architecture; give a local folder, or one of {known}"
            )
        kind, arguments = ARCHITECTURES[pretrained]
        return _cast(kind(**arguments), dtype)


def _cast(network: Any, dtype: torch.dtype) -> Any:
    """Return the network in a dtype; one that has it is left alone, since diffusers warns of every
    cast.
    """
    return network if network.dtype == dtype else network.to(dtype)


def pipeline_on_meta(kind: type[Any], pretrained: str, dtype: torch.dtype) -> Any:
    """Make a pipeline with neither weights nor text encoders, for plans: nothing in it computes a
    number.
    """
    transformer: Any = on_meta(pretrained, dtype)
    folder = Path(pretrained, "vae")
    coder, arguments, patch = AUTOENCODERS[type(transformer)]
    with torch.device("meta"):
        if folder.is_dir():
            vae = coder.from_config(coder.load_config(folder))
        else:
            num_channels = transformer.config.in_channels // patch
            vae = coder(**AUTOENCODER, **arguments, latent_channels=num_channels)
    # A pipeline takes None for a component that is left out, but not that its name is missing.
    names = kind._get_signature_keys(kind)[0]
    text_side = dict.fromkeys(name for name in names if "text" in name or "token" in name)
    return kind(
        transformer=transformer,
        vae=vae.to(dtype),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **text_side,
    )
