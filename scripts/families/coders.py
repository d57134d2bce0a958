"""Autoencoders of every kind that pipelines ask for: narrow, shallow, and of latents that are
shifted and scaled, so that a normalisation that is forgotten shows.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanImage,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
)

CHANNELS = 4
"""Latent channels of all but LTX-Video's."""
WAN_FRAMES = 2
"""Frames that one of Wan's latents stands for, beyond the first."""


def kl(num_levels: int = 3) -> AutoencoderKL:
    """Make an autoencoder of pictures; each level beyond the first halves their sides."""
    return AutoencoderKL(
        **widths(num_levels),
        latent_channels=CHANNELS,
        scaling_factor=1.5,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def widths(num_levels: int) -> dict[str, Any]:
    """Return the blocks of an autoencoder of pictures."""
    return {
        "down_block_types": ("DownEncoderBlock2D",) * num_levels,
        "up_block_types": ("UpDecoderBlock2D",) * num_levels,
        "block_out_channels": (8,) * num_levels,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "mid_block_add_attention": False,
    }


def flux2() -> AutoencoderKLFlux2:
    """Make an autoencoder of FLUX.2's kind, whose statistics are a layer's: a quarter of the
    sides.
    """
    coder: Any = AutoencoderKLFlux2(**widths(3), latent_channels=CHANNELS)
    with torch.no_grad():
        coder.bn.running_mean.normal_()
        coder.bn.running_var.uniform_(0.5, 2.0)
    return coder


def deep_compression() -> AutoencoderDC:
    """Make an autoencoder of SANA's kind: a quarter of the sides."""
    return AutoencoderDC(
        latent_channels=CHANNELS,
        attention_head_dim=4,
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        scaling_factor=0.4,
    )


def statistics() -> dict[str, list[float]]:
    """Return means and standard deviations of latents, one a channel."""
    return {"latents_mean": [-0.4, 0.1, 0.3, 0.8], "latents_std": [1.6, 0.9, 2.0, 1.3]}


def qwen_image(num_halvings: int = 2, num_blocks: int = 1) -> AutoencoderKLQwenImage:
    """Make an autoencoder of Qwen-Image's kind, which takes pictures for videos of one frame.

    It halves the sides so many times, with so many blocks before each.
    """
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=CHANNELS,
        dim_mult=[1] * (num_halvings + 1),
        num_res_blocks=num_blocks,
        temperal_downsample=[False] + [True] * (num_halvings - 1),
        **statistics(),
    )


def hunyuan_image() -> AutoencoderKLHunyuanImage:
    """Make an autoencoder of HunyuanImage's kind: a quarter of the sides."""
    return AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=CHANNELS,
        block_out_channels=(32, 32, 32),
        layers_per_block=1,
        spatial_compression_ratio=4,
        sample_size=64,
        scaling_factor=0.75,
    )


def wan() -> AutoencoderKLWan:
    """Make an autoencoder of Wan's kind: a quarter of the sides, half of the frames."""
    return AutoencoderKLWan(
        base_dim=8,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        scale_factor_spatial=4,
        scale_factor_temporal=WAN_FRAMES,
        **statistics(),
    )


def hunyuan_video() -> AutoencoderKLHunyuanVideo:
    """Make an autoencoder of HunyuanVideo's kind: an eighth of the sides, a quarter of the
    frames.
    """
    return AutoencoderKLHunyuanVideo(
        latent_channels=CHANNELS,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.5,
    )


def ltx_video() -> AutoencoderKLLTXVideo:
    """Make an autoencoder of LTX-Video's kind: an eighth of the sides, half of the frames."""
    scaled = (True, False)
    coder: Any = AutoencoderKLLTXVideo(
        latent_channels=2 * CHANNELS,
        block_out_channels=(8, 8),
        down_block_types=("LTXVideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=scaled,
        decoder_spatio_temporal_scaling=scaled,
        decoder_inject_noise=(False, False, False),
        downsample_type=("conv", "conv"),
        upsample_residual=(False, False),
        upsample_factor=(1, 1),
    )
    with torch.no_grad():
        coder.latents_mean.normal_(std=0.5)
        coder.latents_std.uniform_(0.5, 2.0)
    return coder
