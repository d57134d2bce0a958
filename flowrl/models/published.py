"""The published models that have an option over `derived`, by hub id: what their networks are made
of, for counts and plans without weights.

Classes and arguments beyond their defaults are those of the configurations in each repository, but
numbers that matter to images alone. Models with an adapter of their own are in `architectures.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import nn

from flowrl.models.architectures import (
    AUTOENCODER,
    CLIP_L,
    QWEN3_4B,
    SCALING,
    T5_XXL,
    TEXT_PARAMETERS,
)
from flowrl.models.experts import FIRST


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published model: the classes of its pipeline, of its transformer and of its autoencoder,
    with arguments beyond their defaults.

    `names` are the components of its networks, which are of one size; `settings` is what its
    pipeline is told beside its components; `text_parameters` are those of its text encoders,
    rounded.
    """

    pipeline: type[Any]
    transformer: type[Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    autoencoder: type[Any]
    autoencoder_arguments: Mapping[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] = (FIRST,)
    settings: Mapping[str, Any] = field(default_factory=dict)
    text_parameters: int

    def networks(self) -> dict[str, nn.Module]:
        """Make its networks on the meta device, by component."""
        with torch.device("meta"):
            return {name: self.transformer(**self.arguments) for name in self.names}

    def decoder(self) -> nn.Module:
        """Make its autoencoder on the meta device."""
        with torch.device("meta"):
            network: nn.Module = self.autoencoder(**self.autoencoder_arguments)
        return network


FLUX1_AUTOENCODER = {**AUTOENCODER, **SCALING, "latent_channels": 16}
DEEP_COMPRESSION = {
    "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
}
WAN21_1300M = {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}
WAN22_5B = {
    "in_channels": 48,
    "out_channels": 48,
    "num_attention_heads": 24,
    "num_layers": 30,
    "ffn_dim": 14336,
}
WAN22_AUTOENCODER = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": (0.0,) * 48,
    "latents_std": (1.0,) * 48,
}
QWEN25_VL_7B = 8_290_000_000
GEMMA2_2B = 2_610_000_000
UMT5_XXL = 5_680_000_000
LLAMA3_8B = 7_500_000_000


def _qwen(pipeline: type[Any], **arguments: Any) -> Published:
    """Describe a model of Qwen-Image's size."""
    return Published(
        pipeline=pipeline,
        transformer=QwenImageTransformer2DModel,
        arguments=arguments,
        autoencoder=AutoencoderKLQwenImage,
        text_parameters=QWEN25_VL_7B,
    )


def _wan(
    arguments: Mapping[str, Any], autoencoder: Mapping[str, Any] | None = None, **options: Any
) -> Published:
    """Describe a model of Wan's kind, which draws clips from text."""
    return Published(
        pipeline=WanPipeline,
        transformer=WanTransformer3DModel,
        arguments=arguments,
        autoencoder=AutoencoderKLWan,
        autoencoder_arguments=autoencoder or {},
        text_parameters=UMT5_XXL,
        **options,
    )


Z_IMAGE = Published(
    pipeline=ZImagePipeline,
    transformer=ZImageTransformer2DModel,
    autoencoder=AutoencoderKL,
    autoencoder_arguments=FLUX1_AUTOENCODER,
    text_parameters=QWEN3_4B,
)
PUBLISHED: Mapping[str, Published] = {
    "Qwen/Qwen-Image-2512": _qwen(QwenImagePipeline),
    "Qwen/Qwen-Image-Edit-2511": _qwen(QwenImageEditPlusPipeline, zero_cond_t=True),
    "Tongyi-MAI/Z-Image": Z_IMAGE,
    "Tongyi-MAI/Z-Image-Turbo": Z_IMAGE,
    "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers": Published(
        pipeline=SanaPipeline,
        transformer=SanaTransformer2DModel,
        arguments={"qk_norm": "rms_norm_across_heads"},
        autoencoder=AutoencoderDC,
        autoencoder_arguments=DEEP_COMPRESSION,
        text_parameters=GEMMA2_2B,
    ),
    "black-forest-labs/FLUX.1-Kontext-dev": Published(
        pipeline=FluxKontextPipeline,
        transformer=FluxTransformer2DModel,
        arguments={"guidance_embeds": True},
        autoencoder=AutoencoderKL,
        autoencoder_arguments=FLUX1_AUTOENCODER,
        text_parameters=T5_XXL + CLIP_L,
    ),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": _wan(WAN21_1300M),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": _wan({}),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": _wan(
        {}, names=(FIRST, f"{FIRST}_2"), settings={"boundary_ratio": 0.875}
    ),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": _wan(
        WAN22_5B, WAN22_AUTOENCODER, settings={"expand_timesteps": True}
    ),
    "hunyuanvideo-community/HunyuanVideo": Published(
        pipeline=HunyuanVideoPipeline,
        transformer=HunyuanVideoTransformer3DModel,
        autoencoder=AutoencoderKLHunyuanVideo,
        text_parameters=LLAMA3_8B + CLIP_L,
    ),
    "Lightricks/LTX-Video": Published(
        pipeline=LTXPipeline,
        transformer=LTXVideoTransformer3DModel,
        autoencoder=AutoencoderKLLTXVideo,
        text_parameters=T5_XXL,
    ),
}


def text_parameters(pretrained: str) -> int | None:
    """Return the parameters of a released model's text encoders, rounded, or of a published one's;
    None of another.
    """
    if pretrained in PUBLISHED:
        return PUBLISHED[pretrained].text_parameters
    return TEXT_PARAMETERS.get(pretrained)
