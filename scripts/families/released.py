"""Pipelines of the families that FlowRL's own adapters know, at any size: a transformer's and an
autoencoder's arguments decide.

Text encoders are as wide as the transformer wants; tokenizers know single characters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from families.encoders import clip, language_model, t5
from families.words import chat_tokenizer, clip_tokenizer, t5_tokenizer
from flowrl.models.architectures import SCALING

Arguments = Mapping[str, Any]


def sd3(transformer: Arguments, vae: Arguments) -> StableDiffusion3Pipeline:
    """Make a pipeline of SD3's kind."""
    network: Any = SD3Transformer2DModel(**transformer)
    width = network.config.joint_attention_dim
    pooled = network.config.pooled_projection_dim
    words = clip_tokenizer()
    pieces = t5_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(vae, network.config.in_channels),
        text_encoder=clip(CLIPTextModelWithProjection, words, width // 4, pooled // 4),
        tokenizer=words,
        text_encoder_2=clip(CLIPTextModelWithProjection, words, width // 2, pooled - pooled // 4),
        tokenizer_2=words,
        text_encoder_3=t5(pieces, width),
        tokenizer_3=pieces,
    )


def autoencoder(vae: Arguments, latent_channels: int) -> AutoencoderKL:
    """Make an autoencoder of so many latent channels."""
    return AutoencoderKL(**vae, latent_channels=latent_channels, **SCALING)


def flux1(transformer: Arguments, vae: Arguments, kind: Callable[..., Any] = FluxPipeline) -> Any:
    """Make a pipeline of FLUX.1's kind, or of another that has its parts."""
    network: Any = FluxTransformer2DModel(**transformer)
    words = clip_tokenizer()
    pieces = t5_tokenizer()
    return kind(
        transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=autoencoder(vae, network.config.in_channels // 4),
        text_encoder=clip(CLIPTextModel, words, network.config.pooled_projection_dim, 16),
        tokenizer=words,
        text_encoder_2=t5(pieces, network.config.joint_attention_dim),
        tokenizer_2=pieces,
    )


def flux2_parts(transformer: Arguments, vae: Arguments, words: Sequence[str]) -> dict[str, Any]:
    """Make what all pipelines of FLUX.2's kind have."""
    network: Any = Flux2Transformer2DModel(**transformer)
    coder: Any = AutoencoderKLFlux2(**vae, latent_channels=network.config.in_channels // 4)
    with torch.no_grad():  # statistics that a forgotten normalisation cannot pass for
        coder.bn.running_mean.normal_()
        coder.bn.running_var.uniform_(0.5, 2.0)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return {
        "transformer": network,
        "vae": coder,
        "scheduler": scheduler,
        "tokenizer": chat_tokenizer(words),
    }


def flux2_klein(
    transformer: Arguments, vae: Arguments, words: Sequence[str] = ()
) -> Flux2KleinPipeline:
    """Make a pipeline of FLUX.2 klein's kind, whose tokenizer knows these words."""
    parts = flux2_parts(transformer, vae, words)
    width = parts["transformer"].config.joint_attention_dim // 3
    encoder = Qwen3ForCausalLM(Qwen3Config(**language_model(parts["tokenizer"], width, 27)))
    return Flux2KleinPipeline(**parts, text_encoder=encoder)


def flux2_dev(transformer: Arguments, vae: Arguments, words: Sequence[str] = ()) -> Flux2Pipeline:
    """Make a pipeline of FLUX.2 dev's kind, whose tokenizer knows these words."""
    parts = flux2_parts(transformer, vae, words)
    width = parts["transformer"].config.joint_attention_dim // 3
    text = {"model_type": "mistral", **language_model(parts["tokenizer"], width, 30)}
    sight = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
    }
    sight |= {"num_attention_heads": 2, "head_dim": 8, "image_size": 28}
    encoder = Mistral3ForConditionalGeneration(
        Mistral3Config(text_config=text, vision_config=sight)
    )
    return Flux2Pipeline(**parts, text_encoder=encoder)


ADAPTERS: dict[str, Callable[[Arguments, Arguments], Any]] = {
    "flowrl.models.sd3.SD3": sd3,
    "flowrl.models.flux1.Flux1": flux1,
    "flowrl.models.flux2.Flux2Klein": flux2_klein,
    "flowrl.models.flux2.Flux2Dev": flux2_dev,
}
"""By FlowRL's adapter, the kind of pipeline that it runs."""
