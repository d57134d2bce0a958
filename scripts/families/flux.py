"""Small pipelines of SD3, of FLUX and of its descendants, which draw pictures from packed latents,
and of FLUX Kontext, which edits them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from diffusers import (
    ChromaPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
)

from families import coders, encoders, released, words
from families.family import Family
from families.images import AXES, CHANNELS, HEADS, PACKED, PLAIN, WIDTH

PICTURE = coders.widths(3)
SD3 = HEADS | {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_layers": 3,
    "joint_attention_dim": WIDTH,
    "caption_projection_dim": WIDTH,
    "pooled_projection_dim": WIDTH,
    "pos_embed_max_size": 16,
    "qk_norm": "rms_norm",
    "dual_attention_layers": (0,),
}
FLUX1 = HEADS | {
    "in_channels": PACKED,
    "num_layers": 2,
    "num_single_layers": 2,
    "joint_attention_dim": WIDTH,
    "pooled_projection_dim": 16,
    "axes_dims_rope": AXES,
    "guidance_embeds": True,
}
FLUX2 = HEADS | {
    "in_channels": PACKED,
    "num_layers": 2,
    "num_single_layers": 2,
    "joint_attention_dim": 48,  # three layers of the text encoder
    "axes_dims_rope": (4, 4, 4, 4),
    "timestep_guidance_channels": 16,
}


def chroma() -> ChromaPipeline:
    """Make a pipeline of Chroma's kind."""
    tokenizer = words.t5_tokenizer()
    transformer: Any = ChromaTransformer2DModel(
        **HEADS,
        in_channels=PACKED,
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=AXES,
        approximator_num_channels=8,
        approximator_hidden_dim=WIDTH,
        approximator_layers=1,
    )
    return ChromaPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=coders.kl(),
        text_encoder=encoders.t5(tokenizer, WIDTH),
        tokenizer=tokenizer,
    )


def ovis() -> OvisImagePipeline:
    """Make a pipeline of Ovis-Image's kind."""
    tokenizer = words.qwen_tokenizer()
    transformer: Any = OvisImageTransformer2DModel(
        **HEADS,
        in_channels=PACKED,
        out_channels=PACKED,
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=AXES,
    )
    return OvisImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=coders.kl(),
        text_encoder=encoders.qwen3(tokenizer, WIDTH),
        tokenizer=tokenizer,
    )


SHORT = {"max_sequence_length": 64}
"""Tokens of a text whose tokenizer knows single characters."""
FLUX = {
    "sd3": Family(
        partial(released.sd3, SD3, PICTURE),
        PLAIN | SHORT | {"guidance_scale": 4.5},
        idle=("transformer_blocks.2.attn.add_q_proj",),
    ),
    "flux1": Family(
        partial(released.flux1, FLUX1, PICTURE), PLAIN | SHORT | {"guidance_scale": 3.5}
    ),
    "flux2_dev": Family(
        partial(released.flux2_dev, FLUX2 | {"guidance_embeds": True}, PICTURE, words.WORDS),
        PLAIN | {"guidance_scale": 2.5},
    ),
    "flux2_klein": Family(
        partial(released.flux2_klein, FLUX2 | {"guidance_embeds": False}, PICTURE, words.WORDS),
        PLAIN | {"guidance_scale": 4.0},
    ),
    "chroma": Family(chroma, PLAIN | SHORT | {"guidance_scale": 5.0}),
    "ovis": Family(ovis, PLAIN | {"guidance_scale": 5.0}),
    "flux1_kontext": Family(
        partial(released.flux1, FLUX1, PICTURE, FluxKontextPipeline),
        PLAIN | SHORT | {"guidance_scale": 2.5, "max_area": 32 * 48, "_auto_resize": False},
        picture=(40, 48),
    ),
}
