"""Small pipelines whose steps no velocity can be taken from, each with the reason."""

from __future__ import annotations

from functools import partial
from typing import Any

from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    LTXImageToVideoPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from families import coders, encoders, words
from families.family import Family
from families.images import HEADS, PLAIN, WIDE, WIDTH, hunyuan_image
from families.videos import CLIP, SHORT, ltx_parts

MEL_BINS, SOUND_CHANNELS = 16, 2
"""Frequencies of a sound, and channels of its latents, which keep a quarter of the frequencies."""
SOUND_WIDTH = SOUND_CHANNELS * MEL_BINS // 4
"""Features of a sound's token."""
NUM_TEXT_LAYERS = 2


def ltx_i2v() -> LTXImageToVideoPipeline:
    """Make a pipeline of LTX-Video's kind that continues a picture."""
    return LTXImageToVideoPipeline(**ltx_parts())


def ltx2_transformer() -> Any:
    """Make a transformer of LTX-2's kind, of a video and of its sound."""
    audio = {f"audio_{key}": value for key, value in HEADS.items()}
    return LTX2VideoTransformer3DModel(
        **HEADS,
        **audio,
        in_channels=coders.CHANNELS,
        out_channels=coders.CHANNELS,
        cross_attention_dim=WIDTH,
        audio_in_channels=SOUND_WIDTH,
        audio_out_channels=SOUND_WIDTH,
        audio_cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
        num_layers=2,
        vae_scale_factors=(2, 8, 8),
    )


def ltx2_coders() -> dict[str, Any]:
    """Make the autoencoders of LTX-2's kind, and what turns spectra into sound."""
    video = AutoencoderKLLTX2Video(
        latent_channels=coders.CHANNELS,
        block_out_channels=(8,),
        down_block_types=("LTX2VideoDownBlock3D",),
        decoder_block_out_channels=(8,),
        layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatiotemporal",),
        upsample_type=("spatiotemporal",),
        upsample_residual=(False,),
        upsample_factor=(1,),
    )
    audio = AutoencoderKLLTX2Audio(
        base_channels=SOUND_WIDTH,  # as many as it keeps means of
        ch_mult=(1, 1, 1),
        num_res_blocks=1,
        latent_channels=SOUND_CHANNELS,
        mel_bins=MEL_BINS,
    )
    vocoder = LTX2Vocoder(
        in_channels=2 * MEL_BINS,  # of a stereo sound
        hidden_channels=8,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
    )
    return {"vae": video, "audio_vae": audio, "vocoder": vocoder}


def ltx2() -> LTX2Pipeline:
    """Make a pipeline of LTX-2's kind, which steps a video and its sound together."""
    tokenizer = words.gemma_tokenizer()
    connectors = LTX2TextConnectors(
        caption_channels=WIDTH,
        text_proj_in_factor=NUM_TEXT_LAYERS + 1,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=16,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=8,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=16,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=8,
    )
    return LTX2Pipeline(
        transformer=ltx2_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        **ltx2_coders(),
        text_encoder=encoders.gemma3(tokenizer, WIDTH, NUM_TEXT_LAYERS),
        tokenizer=tokenizer,
        connectors=connectors,
    )


def edm() -> StableDiffusionXLPipeline:
    """Make a pipeline of SDXL's kind with EDM's scheduler, as Playground 2.5 was released."""
    tokenizer = words.clip_tokenizer()
    unet: Any = UNet2DConditionModel(
        in_channels=coders.CHANNELS,
        out_channels=coders.CHANNELS,
        block_out_channels=(WIDTH, WIDTH),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        cross_attention_dim=2 * WIDTH,
    )
    return StableDiffusionXLPipeline(
        unet=unet,
        scheduler=EDMEulerScheduler(),
        vae=coders.kl(),
        text_encoder=encoders.clip(CLIPTextModel, tokenizer, WIDTH, WIDTH),
        tokenizer=tokenizer,
        text_encoder_2=encoders.clip(CLIPTextModelWithProjection, tokenizer, WIDTH, WIDTH),
        tokenizer_2=tokenizer,
    )


REFUSED = {
    "hunyuan_image_memory": Family(
        partial(hunyuan_image, memory_from=1),
        PLAIN,
        obstacle="its guidance remembers earlier steps",
    ),
    "ltx_i2v": Family(
        ltx_i2v,
        CLIP | WIDE | SHORT | {"guidance_scale": 3.0},
        picture=(40, 48),
        obstacle="its first frame is cut from the state before the step",
    ),
    "ltx2": Family(
        ltx2,
        CLIP | WIDE | SHORT | {"guidance_scale": 3.0, "spatio_temporal_guidance_blocks": [1]},
        obstacle="it steps two states, a video and its sound",
    ),
    "edm": Family(
        edm, PLAIN | {"guidance_scale": 3.0}, obstacle="its steps are EDM's, with sigmas above 1"
    ),
}
