"""Small pipelines of the families that draw pictures, each with the schedule of its release."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AdaptiveProjectedMixGuidance,
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PRXPipeline,
    PRXTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)

from families import coders, encoders, words
from families.family import Family

WIDTH = 32
"""Features of every network here: two heads of sixteen."""
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
AXES = (4, 6, 6)
"""Rotary features of a head, by axis."""
CHANNELS, PACKED = coders.CHANNELS, 4 * coders.CHANNELS
"""Of latents, and of their 2x2 patches."""
PLAIN = {"height": 32, "width": 48}
WIDE = {"height": 32, "width": 64}
"""In pixels, for those that want multiples of 32 too."""


def qwen_image() -> QwenImagePipeline:
    """Make a pipeline of Qwen-Image's kind."""
    tokenizer = words.qwen_tokenizer()
    return QwenImagePipeline(
        transformer=qwen_transformer(),
        scheduler=qwen_scheduler(),
        vae=coders.qwen_image(),
        text_encoder=encoders.qwen2_5_vl(tokenizer, WIDTH),
        tokenizer=tokenizer,
    )


def qwen_transformer(**options: Any) -> Any:
    """Make a transformer of Qwen-Image's kind."""
    return QwenImageTransformer2DModel(
        **HEADS,
        in_channels=PACKED,
        out_channels=CHANNELS,
        num_layers=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=AXES,
        **options,
    )


def qwen_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Make Qwen-Image's schedule, which ends above zero and shifts with the picture's size."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        shift_terminal=0.02,
        max_image_seq_len=8192,
    )


def z_image() -> ZImagePipeline:
    """Make a pipeline of Z-Image's kind."""
    tokenizer = words.qwen_tokenizer()
    transformer: Any = ZImageTransformer2DModel(
        in_channels=CHANNELS,
        dim=WIDTH,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=list(AXES),
        axes_lens=[256, 32, 32],
    )
    return ZImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=coders.kl(),
        text_encoder=encoders.qwen3(tokenizer, WIDTH),
        tokenizer=tokenizer,
    )


def sana() -> SanaPipeline:
    """Make a pipeline of SANA's kind, with the solver of its release."""
    tokenizer = words.gemma_tokenizer()
    transformer: Any = SanaTransformer2DModel(
        **HEADS,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
        sample_size=8,
        qk_norm="rms_norm_across_heads",
    )
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return SanaPipeline(
        transformer=transformer,
        scheduler=scheduler,
        vae=coders.deep_compression(),
        text_encoder=encoders.gemma2(tokenizer, WIDTH),
        tokenizer=tokenizer,
    )


def lumina2() -> Lumina2Pipeline:
    """Make a pipeline of Lumina 2's kind, which takes its autoencoder to be eightfold."""
    tokenizer = words.gemma_tokenizer()
    transformer: Any = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=CHANNELS,
        hidden_size=WIDTH,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=AXES,
        axes_lens=(300, 32, 32),
        cap_feat_dim=WIDTH,
    )
    return Lumina2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=coders.kl(num_levels=4),
        text_encoder=encoders.gemma2(tokenizer, WIDTH),
        tokenizer=tokenizer,
    )


def aura_flow() -> AuraFlowPipeline:
    """Make a pipeline of AuraFlow's kind."""
    tokenizer = words.t5_tokenizer()
    transformer: Any = AuraFlowTransformer2DModel(
        **HEADS,
        sample_size=8,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        pos_embed_max_size=256,
    )
    return AuraFlowPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        vae=coders.kl(),
        text_encoder=encoders.umt5(tokenizer, WIDTH),
        tokenizer=tokenizer,
    )


def cogview4() -> CogView4Pipeline:
    """Make a pipeline of CogView 4's kind, which shifts its sigmas and not its timesteps."""
    tokenizer = words.glm_tokenizer()
    transformer: Any = CogView4Transformer2DModel(
        **HEADS,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        text_embed_dim=WIDTH,
        time_embed_dim=WIDTH,
        condition_dim=8,
        rope_axes_dim=(16, 16),
        sample_size=8,
        pos_embed_max_size=16,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"
    )
    return CogView4Pipeline(
        transformer=transformer,
        scheduler=scheduler,
        vae=coders.kl(),
        text_encoder=encoders.glm(tokenizer, WIDTH),
        tokenizer=tokenizer,
    )


def hunyuan_image(memory_from: int = 1000) -> HunyuanImagePipeline:
    """Make a pipeline of HunyuanImage's kind, whose guidance is plain before step `memory_from`,
    and remembers earlier steps from there on.
    """
    tokenizer = words.qwen_tokenizer()
    letters = words.byte_tokenizer()
    transformer: Any = HunyuanImageTransformer2DModel(
        **HEADS,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=WIDTH,
        text_embed_2_dim=WIDTH,
        rope_axes_dim=(8, 8),
    )
    return HunyuanImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=coders.hunyuan_image(),
        text_encoder=encoders.qwen2_5_vl(tokenizer, WIDTH, num_layers=4),
        tokenizer=tokenizer,
        text_encoder_2=encoders.t5(letters, WIDTH),
        tokenizer_2=letters,
        guider=AdaptiveProjectedMixGuidance(
            guidance_scale=3.5, adaptive_projected_guidance_start_step=memory_from
        ),
    )


def krea2() -> Krea2Pipeline:
    """Make a pipeline of Krea 2's kind, which reads several layers of its text encoder."""
    tokenizer = words.qwen_tokenizer()
    layers = (1, 2)
    transformer: Any = Krea2Transformer2DModel(
        **HEADS,
        in_channels=PACKED,
        num_layers=2,
        num_key_value_heads=1,
        intermediate_size=2 * WIDTH,
        timestep_embed_dim=16,
        text_hidden_dim=WIDTH,
        num_text_layers=len(layers),
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=2 * WIDTH,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=AXES,
    )
    return Krea2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=coders.qwen_image(),
        text_encoder=encoders.qwen3_vl(tokenizer, WIDTH),
        tokenizer=tokenizer,
        text_encoder_select_layers=layers,
    )


def prx() -> PRXPipeline:
    """Make a pipeline of PRX's kind."""
    tokenizer = words.gemma_tokenizer()
    transformer: Any = PRXTransformer2DModel(
        in_channels=CHANNELS,
        context_in_dim=WIDTH,
        hidden_size=WIDTH,
        mlp_ratio=2.0,
        num_heads=2,
        depth=2,
        axes_dim=[8, 8],
    )
    return PRXPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=coders.kl(),
        text_encoder=encoders.t5gemma(tokenizer, WIDTH),
        tokenizer=tokenizer,
    )


QWEN_GUIDANCE = {"true_cfg_scale": 4.0, "negative_prompt": " "}
QWEN_IDLE = ("transformer_blocks.1.attn.add_q_proj", "transformer_blocks.1.attn.to_add_out")
IMAGES = {
    "qwen_image": Family(qwen_image, PLAIN | QWEN_GUIDANCE, idle=QWEN_IDLE),
    "z_image": Family(z_image, PLAIN | {"guidance_scale": 4.0}),
    "sana": Family(sana, WIDE | {"guidance_scale": 4.5, "use_resolution_binning": False}),
    "lumina2": Family(lumina2, {"height": 64, "width": 96, "guidance_scale": 4.0}),
    "aura_flow": Family(aura_flow, PLAIN | {"guidance_scale": 3.5, "max_sequence_length": 64}),
    "cogview4": Family(cogview4, PLAIN | {"guidance_scale": 5.0}),
    "hunyuan_image": Family(hunyuan_image, PLAIN),
    "krea2": Family(krea2, PLAIN | {"guidance_scale": 4.5, "max_sequence_length": 64}),
    "prx": Family(prx, PLAIN | {"guidance_scale": 4.0, "use_resolution_binning": False}),
}
