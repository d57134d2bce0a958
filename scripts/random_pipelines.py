"""Pipelines of each family with random weights, in diffusers layout: real classes at any size, for
tests and timing.

    python scripts/random_pipelines.py model=sd35_medium FOLDER  # released size, tiny text encoders

Text encoders are as wide as the transformer wants and as shallow as the pipeline allows; tokenizers
know single characters.
"""

from __future__ import annotations

from flowrl.launch.program import run_program

import argparse
import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
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
from tokenizers import pre_tokenizers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from flowrl.launch.compose import compose
from flowrl.models.architectures import ARCHITECTURES, AUTOENCODER, SCALING
from flowrl.runs.files import grant_usual_mode

LETTERS = string.ascii_lowercase + string.digits + ",.-'"
NUM_CLIP_TOKENS = 77
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor "
    "%}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def clip_tokenizer() -> CLIPTokenizer:
    """Make a tokenizer of CLIP's kind that knows single characters."""
    tokens = [
        "<|startoftext|>",
        "<|endoftext|>",
        *LETTERS,
        *(f"{letter}</w>" for letter in LETTERS),
    ]
    vocab = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=NUM_CLIP_TOKENS)


def t5_tokenizer() -> T5Tokenizer:
    """Make a tokenizer of T5's kind that knows single characters."""
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁", -2.0),
        *((letter, -3.0) for letter in LETTERS),
    ]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def chat_tokenizer() -> Qwen2Tokenizer:
    """Make a tokenizer of Qwen's kind that knows single bytes."""
    tokens = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
    ]
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], chat_template=CHAT)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def clip(kind: type[Any], tokenizer: CLIPTokenizer, width: int, projection: int) -> Any:
    """Make a text encoder of CLIP's kind, two layers deep."""
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=NUM_CLIP_TOKENS,
        vocab_size=len(tokenizer),
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return kind(config)


def t5(tokenizer: T5Tokenizer, width: int) -> T5EncoderModel:
    """Make a text encoder of T5's kind, one layer deep."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_heads=2,
        num_layers=1,
        pad_token_id=0,
        eos_token_id=1,
    )
    return T5EncoderModel(config)


def language_model(tokenizer: Qwen2Tokenizer, width: int, num_layers: int) -> dict[str, Any]:
    """Return the options of a small language model."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "initializer_range": 0.3,
    }


def sd3(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> StableDiffusion3Pipeline:
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


def autoencoder(vae: Mapping[str, Any], latent_channels: int) -> AutoencoderKL:
    """Make an autoencoder of so many latent channels."""
    return AutoencoderKL(**vae, latent_channels=latent_channels, **SCALING)


def flux1(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> FluxPipeline:
    """Make a pipeline of FLUX.1's kind."""
    network: Any = FluxTransformer2DModel(**transformer)
    words = clip_tokenizer()
    pieces = t5_tokenizer()
    return FluxPipeline(
        transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=autoencoder(vae, network.config.in_channels // 4),
        text_encoder=clip(CLIPTextModel, words, network.config.pooled_projection_dim, 16),
        tokenizer=words,
        text_encoder_2=t5(pieces, network.config.joint_attention_dim),
        tokenizer_2=pieces,
    )


def flux2_parts(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> dict[str, Any]:
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
        "tokenizer": chat_tokenizer(),
    }


def flux2_klein(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> Flux2KleinPipeline:
    """Make a pipeline of FLUX.2 klein's kind."""
    parts = flux2_parts(transformer, vae)
    width = parts["transformer"].config.joint_attention_dim // 3
    encoder = Qwen3ForCausalLM(Qwen3Config(**language_model(parts["tokenizer"], width, 27)))
    return Flux2KleinPipeline(**parts, text_encoder=encoder)


def flux2_dev(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> Flux2Pipeline:
    """Make a pipeline of FLUX.2 dev's kind."""
    parts = flux2_parts(transformer, vae)
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


FAMILIES: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], Any]] = {
    "flowrl.models.sd3.SD3": sd3,
    "flowrl.models.flux1.Flux1": flux1,
    "flowrl.models.flux2.Flux2Klein": flux2_klein,
    "flowrl.models.flux2.Flux2Dev": flux2_dev,
}


def save(pipeline: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write a pipeline, its networks in `dtype`."""
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.to(dtype)
    pipeline.save_pretrained(folder, safe_serialization=True)
    grant_usual_mode(folder)


def main() -> None:
    """Write the pipeline of a released size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="model=NAME, one of conf/model")
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    cfg = compose(["name=random", args.model]).model
    torch.manual_seed(0)
    _, transformer = ARCHITECTURES[cfg.pretrained]
    torch.set_default_dtype(torch.bfloat16)
    save(FAMILIES[cfg["_target_"]](transformer, AUTOENCODER), args.folder, torch.bfloat16)
    print(f"{args.folder}: {cfg.pretrained} with random weights")


if __name__ == "__main__":
    raise SystemExit(run_program(main))
