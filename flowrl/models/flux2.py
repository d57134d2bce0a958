"""FLUX.2: adapters over `Flux2KleinPipeline` (`Flux2Klein`) and `Flux2Pipeline` (`Flux2Dev`).

The rest of FlowRL sees normalised latents of 32 channels at an eighth of the resolution. Packing
into tokens of 2x2 patches, and the autoencoder's batch-norm statistics over their 128 channels,
stay in here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from flowrl.errors import UserError
from flowrl.models.guidance import check_embedded, classifier_free
from flowrl.models.latents import (
    from_images,
    latent_size,
    pack,
    per_row,
    to_images,
    token_positions,
    unpack,
    weight_dtype,
)
from flowrl.models.loading import Source, autoencoder, image_components
from flowrl.models.text import TextEncoders, quiet
from flowrl.types import Conditioning
from flowrl.values.bounds import Dtype, Quantization, Resolution, Text, TextLength
from flowrl.values.sizes import height_and_width

TEXT = ("text_encoder", "tokenizer")
AXES = 4
"""The axes of a token's position: image number, row, column, place in the text."""
PATCH = 2
"""Side of the latents' patches, each of which is one token."""


class Flux2Klein:
    """FLUX.2-klein: the base models use a true negative prompt (`has_guidance`), the distilled ones
    no guidance.

    `max_sequence_length` is the number of text tokens, chat template included. `resolution` is the
    image's size in pixels, and `channels_last` the memory layout of the autoencoder, which matters
    to its speed.
    """

    pipeline_class: ClassVar[type[Any]] = Flux2KleinPipeline

    def __init__(
        self,
        *,
        pretrained: Text,
        revision: Text | None,
        dtype: Dtype,
        resolution: Resolution,
        max_sequence_length: TextLength,
        has_guidance: bool,
        channels_last: bool,
        quantization: Quantization | None = None,
    ) -> None:
        source = Source(self.pipeline_class, pretrained, revision, dtype, quantization=quantization)
        self.pipeline: Any = source.load(**dict.fromkeys(TEXT))
        if has_guidance and self.pipeline.config.is_distilled:
            raise UserError(
                f"model.has_guidance=true, but {pretrained} is distilled and ignores guidance: set "
                "it to false"
            )
        self.transformer = self.pipeline.transformer.requires_grad_(False)
        self.vae = autoencoder(self.pipeline, channels_last)
        image_side = image_components(self.pipeline)
        self.text = TextEncoders(lambda: source.load(**image_side), TEXT)
        self.negative_prompt = "" if has_guidance else None
        self.max_sequence_length = max_sequence_length
        self.conditioning_shapes = _conditioning_shapes(self.transformer, max_sequence_length)
        self.conditioning_dtypes: Mapping[str, torch.dtype] = {}
        self.embedding_key = f"{source.identity(TEXT)} {max_sequence_length}"
        self.latent_shape = _latent_shape(self.pipeline, resolution)
        self.image_size = height_and_width(resolution)

    def to(self, device: torch.device) -> None:
        self.pipeline.to(device)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        return _encode(self.text.pipeline(), prompts, self.max_sequence_length)

    def truncated_part(self, prompt: str) -> str:
        # The limit holds for the prompt within its chat template, as the stock pipeline writes it.
        messages = [{"role": "user", "content": prompt}]
        text = self.text.pipeline().tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        return self.text.truncated_part(str(text), {"tokenizer": self.max_sequence_length})

    def drop_text_encoders(self) -> None:
        self.text.drop()

    def velocity(
        self,
        x: Float[Tensor, "B C h w"],
        sigma: float,
        conditioning: Conditioning,
        guidance_scale: float,
    ) -> Float[Tensor, "B C h w"]:
        def forward(x: Tensor, conditioning: Conditioning) -> Tensor:
            return _velocity(self.transformer, x, sigma, conditioning, None)

        return classifier_free(forward, x, conditioning, guidance_scale)

    @torch.no_grad()
    def decode(self, x0: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        return self.decode_with_graph(x0)

    def decode_with_graph(self, x0: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        return to_images(denormalise(x0, self.vae), self.vae)

    @torch.no_grad()
    def encode_images(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        return normalise(from_images(images, self.vae), self.vae)


class Flux2Dev:
    """FLUX.2-dev: guidance-distilled, so that the scale is an input and there is no negative
    prompt.

    `max_sequence_length` is the number of text tokens, system message included. `resolution` is the
    image's size in pixels, and `channels_last` the memory layout of the autoencoder, which matters
    to its speed.
    """

    pipeline_class: ClassVar[type[Any]] = Flux2Pipeline

    negative_prompt = None

    def __init__(
        self,
        *,
        pretrained: Text,
        revision: Text | None,
        dtype: Dtype,
        resolution: Resolution,
        max_sequence_length: TextLength,
        has_guidance: bool,
        channels_last: bool,
        quantization: Quantization | None = None,
    ) -> None:
        source = Source(self.pipeline_class, pretrained, revision, dtype, quantization=quantization)
        self.pipeline: Any = source.load(**dict.fromkeys(TEXT))
        self.transformer = self.pipeline.transformer.requires_grad_(False)
        self.vae = autoencoder(self.pipeline, channels_last)
        image_side = image_components(self.pipeline)
        self.text = TextEncoders(lambda: source.load(**image_side), TEXT)
        check_embedded(has_guidance, self.transformer.config.guidance_embeds, "FLUX.2")
        self.max_sequence_length = max_sequence_length
        self.conditioning_shapes = _conditioning_shapes(self.transformer, max_sequence_length)
        self.conditioning_dtypes: Mapping[str, torch.dtype] = {}
        self.embedding_key = f"{source.identity(TEXT)} {max_sequence_length}"
        self.latent_shape = _latent_shape(self.pipeline, resolution)
        self.image_size = height_and_width(resolution)

    def to(self, device: torch.device) -> None:
        self.pipeline.to(device)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        return _encode(self.text.pipeline(), prompts, self.max_sequence_length)

    def truncated_part(self, prompt: str) -> str:
        pipeline = self.text.pipeline()
        # The limit holds for the prompt after its system message. As the stock pipeline writes it,
        # a prompt holds no mark of an image, which the processor would look for.
        user_text = prompt.replace("[IMG]", "")
        messages = [
            _message("system", pipeline.system_message),
            _message("user", user_text),
        ]
        text = pipeline.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=False
        )
        return self.text.truncated_part(str(text), {"tokenizer": self.max_sequence_length})

    def drop_text_encoders(self) -> None:
        self.text.drop()

    def velocity(
        self,
        x: Float[Tensor, "B C h w"],
        sigma: float,
        conditioning: Conditioning,
        guidance_scale: float,
    ) -> Float[Tensor, "B C h w"]:
        return _velocity(self.transformer, x, sigma, conditioning, guidance_scale)

    @torch.no_grad()
    def decode(self, x0: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        return self.decode_with_graph(x0)

    def decode_with_graph(self, x0: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        return to_images(denormalise(x0, self.vae), self.vae)

    @torch.no_grad()
    def encode_images(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        return normalise(from_images(images, self.vae), self.vae)


def _message(role: str, text: str) -> dict[str, Any]:
    """Return one message of a chat, in the form that Mistral's processor takes."""
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _conditioning_shapes(transformer: Any, num_tokens: int) -> dict[str, tuple[int, ...]]:
    return {"tokens": (num_tokens, transformer.config.joint_attention_dim), "pooled": (0,)}


def _latent_shape(pipeline: Any, resolution: Resolution) -> tuple[int, int, int]:
    height, width = latent_size(resolution, pipeline.vae_scale_factor, PATCH)
    # A token holds the channels of all its patch's latents.
    num_channels = pipeline.transformer.config.in_channels // PATCH**2
    return num_channels, height, width


@torch.no_grad()
def _encode(pipeline: Any, prompts: Sequence[str], max_sequence_length: int) -> Conditioning:
    """Encode prompts by the stock pipeline, in whose chat template they stand."""
    with quiet():
        device = pipeline.text_encoder.device
        tokens, _ = pipeline.encode_prompt(
            list(prompts), device=device, max_sequence_length=max_sequence_length
        )
    # FLUX.2 takes no pooled embedding: one of no features, as stored rows have it.
    pooled = tokens.new_zeros(len(tokens), 0)
    return Conditioning({"tokens": tokens, "pooled": pooled})


def _velocity(
    transformer: Any, x: Tensor, sigma: float, conditioning: Conditioning, guidance: float | None
) -> Tensor:
    """Run one pass; `guidance` is the scale that a distilled model takes as an input."""
    size = x.shape[-2:]
    num_text = conditioning.tensors["tokens"].shape[1]
    text_positions = torch.zeros(num_text, AXES, device=x.device)
    text_positions[:, -1] = torch.arange(num_text, device=x.device)
    guidance_rows = None if guidance is None else per_row(guidance, x)
    # The transformer multiplies its timestep by 1000, and so takes sigma itself.
    output = transformer(
        hidden_states=pack(x).to(weight_dtype(transformer)),
        timestep=per_row(sigma, x),
        guidance=guidance_rows,
        encoder_hidden_states=conditioning.tensors["tokens"],
        img_ids=token_positions(size, AXES, x.device),
        txt_ids=text_positions,
        return_dict=False,
    )[0]
    return unpack(output.float(), size)


def denormalise(x: Float[Tensor, "B C h w"], vae: Any) -> Float[Tensor, "B C h w"]:
    """Return the autoencoder's own latents: each of the 128 patch channels times its running std,
    plus its mean.
    """
    std, mean = _statistics(vae)
    patches = functional.pixel_unshuffle(x, PATCH)  # [B, 4 C, h / 2, w / 2]
    patches = patches * std[:, None, None] + mean[:, None, None]
    return functional.pixel_shuffle(patches, PATCH)


def normalise(z: Float[Tensor, "B C h w"], vae: Any) -> Float[Tensor, "B C h w"]:
    """Undo `denormalise`, so that each patch channel has about mean 0 and variance 1."""
    std, mean = _statistics(vae)
    patches = functional.pixel_unshuffle(z, PATCH)
    patches = (patches - mean[:, None, None]) / std[:, None, None]
    return functional.pixel_shuffle(patches, PATCH)


def _statistics(vae: Any) -> tuple[Float[Tensor, "Q"], Float[Tensor, "Q"]]:
    """Return the running std and mean of the autoencoder's Q patch channels."""
    # The statistics belong to channels of packed patches, in float32 whatever the network's dtype.
    std = (vae.bn.running_var.float() + vae.config.batch_norm_eps).sqrt()
    return std, vae.bn.running_mean.float()
