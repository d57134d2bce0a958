"""Text encoders of every kind that pipelines ask for: as wide as the transformer wants, and as
shallow as the pipeline allows.

Their weights are larger than a fresh model's, so that a prompt's words tell in its embedding.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    CLIPTextConfig,
    Gemma2Config,
    Gemma2Model,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GlmConfig,
    GlmModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
    T5GemmaModuleConfig,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

from families.words import NUM_CLIP_TOKENS

SPREAD = 0.3
"""Standard deviation of a text encoder's weights."""

Tokenizer = PreTrainedTokenizerBase


def clip(kind: type[Any], tokenizer: Tokenizer, width: int, projection: int) -> Any:
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


def t5_options(num_tokens: int, width: int) -> dict[str, Any]:
    """Return the options of a T5 encoder, one layer deep."""
    return {
        "vocab_size": num_tokens,
        "d_model": width,
        "d_kv": 8,
        "d_ff": 2 * width,
        "num_heads": 2,
        "num_layers": 1,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def t5(tokenizer: Tokenizer, width: int) -> T5EncoderModel:
    """Make a text encoder of T5's kind."""
    return T5EncoderModel(T5Config(**t5_options(len(tokenizer), width)))


def umt5(tokenizer: Tokenizer, width: int) -> UMT5EncoderModel:
    """Make a text encoder of UMT5's kind."""
    return UMT5EncoderModel(UMT5Config(**t5_options(len(tokenizer), width)))


def language_model(tokenizer: Tokenizer, width: int, num_layers: int) -> dict[str, Any]:
    """Return the options of a small language model."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "initializer_range": SPREAD,
    }


def qwen3(tokenizer: Tokenizer, width: int) -> Qwen3Model:
    """Make a language model of Qwen 3's kind, two layers deep."""
    return Qwen3Model(Qwen3Config(**language_model(tokenizer, width, 2)))


def gemma2(tokenizer: Tokenizer, width: int) -> Gemma2Model:
    """Make a language model of Gemma 2's kind, two layers deep."""
    return Gemma2Model(Gemma2Config(**language_model(tokenizer, width, 2)))


def gemma3(tokenizer: Tokenizer, width: int, num_layers: int) -> Any:
    """Make a model of Gemma 3's kind, which could see pictures."""
    text = language_model(tokenizer, width, num_layers)
    sight = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(text_config=text, vision_config=sight, mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(config)


def glm(tokenizer: Tokenizer, width: int) -> GlmModel:
    """Make a language model of GLM's kind, two layers deep."""
    options = language_model(tokenizer, width, 2)
    return GlmModel(GlmConfig(**options, pad_token_id=tokenizer.pad_token_id))


def llama(tokenizer: Tokenizer, width: int) -> LlamaModel:
    """Make a language model of Llama's kind, four layers deep: pipelines leave the last two."""
    options = language_model(tokenizer, width, 4)
    return LlamaModel(LlamaConfig(**options, pad_token_id=tokenizer.pad_token_id))


def t5gemma(tokenizer: Tokenizer, width: int) -> Any:
    """Make the encoder of a T5Gemma, two layers deep.

    Its class is not public in transformers. Diffusers puts there one that it can load, which reads
    the encoder's options below the key `encoder`.
    """
    options = language_model(tokenizer, width, 2) | {"dropout_rate": 0.0}
    options["encoder"] = dict(options)
    config: Any = T5GemmaModuleConfig(**options)
    return T5GemmaEncoder(config)


def qwen2_5_vl(tokenizer: Tokenizer, width: int, num_layers: int = 2) -> Any:
    """Make a model of Qwen 2.5 VL's kind: it reads a picture of 28x28 pixels as one token."""
    text = language_model(tokenizer, width, num_layers)
    text.pop("head_dim")  # its heads share the width
    text |= {"bos_token_id": None, "eos_token_id": None}
    sections = [width // 16, width // 16, width // 8]
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": sections,
    }
    sight = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": width,
        "fullatt_block_indexes": [0],
        "initializer_range": SPREAD,
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=sight, **marks_of(tokenizer))
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl(tokenizer: Tokenizer, width: int) -> Any:
    """Make a model of Qwen 3 VL's kind, two layers deep."""
    text = language_model(tokenizer, width, 2)
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 1, 1],
    }
    sight = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": width,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    return Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=sight, **marks_of(tokenizer)))


def marks_of(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the numbers of the tokens that stand around and for a picture."""
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}
