"""Small pipelines of the families that draw clips, each with the schedule of its release."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import CLIPTextModel

from families import coders, encoders, words
from families.family import Family
from families.images import AXES, CHANNELS, HEADS, PLAIN, WIDE, WIDTH

POOLED = 16


def wan_transformer(in_channels: int = CHANNELS) -> Any:
    """Make a transformer of Wan's kind."""
    return WanTransformer3DModel(
        **HEADS,
        in_channels=in_channels,
        out_channels=CHANNELS,
        text_dim=WIDTH,
        freq_dim=16,
        ffn_dim=2 * WIDTH,
        num_layers=2,
        rope_max_seq_len=32,
    )


def wan_pipeline(
    kind: Callable[..., Any] = WanPipeline, in_channels: int = CHANNELS, **options: Any
) -> Any:
    """Make a pipeline of Wan's kind, with the solver of its release."""
    tokenizer = words.t5_tokenizer()
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return kind(
        transformer=wan_transformer(in_channels),
        scheduler=scheduler,
        vae=coders.wan(),
        text_encoder=encoders.umt5(tokenizer, WIDTH),
        tokenizer=tokenizer,
        **options,
    )


def wan21() -> WanPipeline:
    """Make a pipeline of Wan 2.1's kind."""
    return wan_pipeline()


def wan22() -> WanPipeline:
    """Make a pipeline of Wan 2.2's kind, whose first steps are another network's than its last."""
    return wan_pipeline(transformer_2=wan_transformer(), boundary_ratio=0.875)


def wan22_ti2v() -> WanPipeline:
    """Make a pipeline of Wan 2.2 TI2V's kind, which gives each token a timestep of its own."""
    return wan_pipeline(expand_timesteps=True)


def wan22_i2v() -> WanImageToVideoPipeline:
    """Make a pipeline of Wan 2.2 I2V's kind, which puts a picture's latents beside the state."""
    return wan_pipeline(WanImageToVideoPipeline, in_channels=2 * CHANNELS + coders.WAN_FRAMES)


def hunyuan_video() -> HunyuanVideoPipeline:
    """Make a pipeline of HunyuanVideo's kind."""
    tokenizer = words.llama_tokenizer()
    letters = words.clip_tokenizer()
    transformer: Any = HunyuanVideoTransformer3DModel(
        **HEADS,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=WIDTH,
        pooled_projection_dim=POOLED,
        rope_axes_dim=AXES,
    )
    return HunyuanVideoPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        vae=coders.hunyuan_video(),
        text_encoder=encoders.llama(tokenizer, WIDTH),
        tokenizer=tokenizer,
        text_encoder_2=encoders.clip(CLIPTextModel, letters, POOLED, 16),
        tokenizer_2=letters,
    )


def kandinsky5() -> Kandinsky5T2VPipeline:
    """Make a pipeline of Kandinsky 5's kind, whose state has its channels last."""
    tokenizer = words.qwen_processor()
    letters = words.clip_tokenizer()
    transformer: Any = Kandinsky5Transformer3DModel(
        in_visual_dim=CHANNELS,
        out_visual_dim=CHANNELS,
        in_text_dim=WIDTH,
        in_text_dim2=POOLED,
        time_dim=16,
        model_dim=WIDTH,
        ff_dim=2 * WIDTH,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=AXES,
    )
    return Kandinsky5T2VPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=coders.hunyuan_video(),
        text_encoder=encoders.qwen2_5_vl(tokenizer.tokenizer, WIDTH),
        tokenizer=tokenizer,
        text_encoder_2=encoders.clip(CLIPTextModel, letters, POOLED, 16),
        tokenizer_2=letters,
    )


def ltx_parts() -> dict[str, Any]:
    """Make what all pipelines of LTX-Video's kind have."""
    tokenizer = words.t5_tokenizer()
    transformer: Any = LTXVideoTransformer3DModel(
        **HEADS,
        in_channels=2 * CHANNELS,
        out_channels=2 * CHANNELS,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
        num_layers=2,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1
    )
    return {
        "transformer": transformer,
        "scheduler": scheduler,
        "vae": coders.ltx_video(),
        "text_encoder": encoders.t5(tokenizer, WIDTH),
        "tokenizer": tokenizer,
    }


def ltx_video() -> LTXPipeline:
    """Make a pipeline of LTX-Video's kind."""
    return LTXPipeline(**ltx_parts())


CLIP = PLAIN | {"num_frames": 5}
SHORT = {"max_sequence_length": 64}
VIDEOS = {
    "wan21": Family(wan21, CLIP | SHORT | {"guidance_scale": 5.0}),
    "wan22": Family(wan22, CLIP | SHORT | {"guidance_scale": 4.0, "guidance_scale_2": 3.0}),
    "wan22_ti2v": Family(wan22_ti2v, CLIP | SHORT | {"guidance_scale": 5.0}),
    "wan22_i2v": Family(wan22_i2v, CLIP | SHORT | {"guidance_scale": 3.5}, picture=(40, 48)),
    "hunyuan_video": Family(hunyuan_video, CLIP | {"guidance_scale": 6.0}),
    "kandinsky5": Family(kandinsky5, CLIP | {"guidance_scale": 5.0}),
    "ltx_video": Family(ltx_video, CLIP | WIDE | SHORT | {"guidance_scale": 3.0}),
}
