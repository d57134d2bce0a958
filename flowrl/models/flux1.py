"""FLUX.1: an adapter over `FluxPipeline`. Its latents have 16 channels, and are packed into tokens
of 2x2 patches in here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import FluxPipeline
from jaxtyping import Float
from torch import Tensor

from flowrl.errors import UserError
from flowrl.models.guidance import check_embedded
from flowrl.models.latents import (
    from_images,
    latent_size,
    pack,
    per_row,
    scale,
    to_images,
    token_positions,
    unpack,
    unscale,
    weight_dtype,
)
from flowrl.models.loading import Source, autoencoder, image_components
from flowrl.models.text import TextEncoders, quiet
from flowrl.types import Conditioning
from flowrl.values.bounds import Dtype, Quantization, Resolution, Text, TextLength
from flowrl.values.sizes import height_and_width

TEXT = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
AXES = 3
"""The axes of a token's position: unused, row, column. Text tokens stand at 0."""
PATCH = 2
"""Side of the latents' patches, each of which is one token."""


class Flux1:
    """FLUX.1-dev, which takes the guidance scale as an input (`has_guidance`), and FLUX.1-schnell,
    which does not.

    `max_sequence_length` is the number of T5 tokens; CLIP gives the pooled embedding alone.
    `resolution` is the image's size in pixels, and `channels_last` the memory layout of the
    autoencoder, which matters to its speed.
    """

    pipeline_class: ClassVar[type[Any]] = FluxPipeline

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
        check_embedded(has_guidance, self.transformer.config.guidance_embeds, "FLUX.1")
        self.has_guidance = has_guidance
        self.max_sequence_length = max_sequence_length
        config = self.transformer.config
        self.conditioning_shapes = {
            "tokens": (max_sequence_length, config.joint_attention_dim),
            "pooled": (config.pooled_projection_dim,),
        }
        self.conditioning_dtypes: Mapping[str, torch.dtype] = {}
        self.embedding_key = f"{source.identity(TEXT)} {max_sequence_length}"
        self.size = latent_size(resolution, self.pipeline.vae_scale_factor, PATCH)
        # A token holds the channels of all its patch's latents.
        num_channels = self.transformer.config.in_channels // PATCH**2
        self.latent_shape = (num_channels, *self.size)
        self.image_size = height_and_width(resolution)

    def to(self, device: torch.device) -> None:
        self.pipeline.to(device)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        pipeline = self.text.pipeline()
        with quiet():
            tokens, pooled, _ = pipeline.encode_prompt(
                list(prompts),
                device=pipeline.text_encoder.device,
                max_sequence_length=self.max_sequence_length,
            )
        return Conditioning({"tokens": tokens, "pooled": pooled})

    def truncated_part(self, prompt: str) -> str:
        # The first tokenizer is CLIP's, whose length is fixed; the second is T5's.
        limits = {
            "tokenizer": self.text.pipeline().tokenizer_max_length,
            "tokenizer_2": self.max_sequence_length,
        }
        return self.text.truncated_part(prompt, limits)

    def drop_text_encoders(self) -> None:
        self.text.drop()

    def velocity(
        self,
        x: Float[Tensor, "B C h w"],
        sigma: float,
        conditioning: Conditioning,
        guidance_scale: float,
    ) -> Float[Tensor, "B C h w"]:
        if guidance_scale != 1 and not self.has_guidance:
            raise UserError(f"guidance_scale={guidance_scale} needs model.has_guidance=true")
        # The transformer multiplies its timestep by 1000, and so takes sigma itself.
        output = self.transformer(
            hidden_states=pack(x).to(weight_dtype(self.transformer)),
            timestep=per_row(sigma, x),
            guidance=per_row(guidance_scale, x) if self.has_guidance else None,
            encoder_hidden_states=conditioning.tensors["tokens"],
            pooled_projections=conditioning.tensors["pooled"],
            img_ids=token_positions(self.size, AXES, x.device),
            txt_ids=x.new_zeros(conditioning.tensors["tokens"].shape[1], AXES),
            return_dict=False,
        )[0]
        return unpack(output.float(), self.size)

    @torch.no_grad()
    def decode(self, x0: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        return self.decode_with_graph(x0)

    def decode_with_graph(self, x0: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        return to_images(unscale(x0, self.vae), self.vae)

    @torch.no_grad()
    def encode_images(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        return scale(from_images(images, self.vae), self.vae)
