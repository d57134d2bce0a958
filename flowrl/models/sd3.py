"""Stable Diffusion 3 and 3.5, and the embedded shapes model: an adapter over
`StableDiffusion3Pipeline`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusion3Pipeline
from jaxtyping import Float
from torch import Tensor

from flowrl.errors import UserError
from flowrl.models.guidance import classifier_free
from flowrl.models.latents import (
    from_images,
    latent_size,
    per_row,
    scale,
    to_images,
    unscale,
    weight_dtype,
)
from flowrl.models.loading import Source, autoencoder, image_components
from flowrl.models.text import TextEncoders, quiet
from flowrl.types import Conditioning
from flowrl.values.bounds import Dtype, Quantization, Resolution, Text, TextLength
from flowrl.values.sizes import height_and_width
from flowrl.values.wording import show

T5 = ("text_encoder_3", "tokenizer_3")
CLIP_TOKENS = 77
"""Rows that both CLIPs add to T5's; prompts are padded to it."""

TEXT = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", *T5)


class SD3:
    """A pipeline in diffusers layout, from a local folder or a hub id.

    `max_sequence_length` is the number of T5 tokens; 0 leaves the T5 encoder out. `resolution` is
    the image's size in pixels. With `has_guidance` False negative prompts are not encoded and
    guidance is refused. `channels_last` is the memory layout of the autoencoder, which matters to
    its speed, and `decode_dtype` its dtype, that of the other networks if None: flow_grpo decodes
    in float32 beside a transformer in 16 bits. Raises UserError for a resolution beyond the model's
    positions, and for T5 tokens of a pipeline without T5.
    """

    pipeline_class: ClassVar[type[Any]] = StableDiffusion3Pipeline

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
        decode_dtype: Dtype | None = None,
        quantization: Quantization | None = None,
    ) -> None:
        source = Source(
            self.pipeline_class, pretrained, revision, dtype, decode_dtype, quantization
        )
        if max_sequence_length and not source.has("text_encoder_3"):
            raise UserError(
                f"model.max_sequence_length={max_sequence_length} asks for T5 tokens, but "
                f"{pretrained} has no text_encoder_3; set model.max_sequence_length=0, or give a "
                "folder with T5"
            )
        self.pipeline: Any = source.load(**dict.fromkeys(TEXT))
        self.transformer = self.pipeline.transformer.requires_grad_(False)
        self.vae = autoencoder(self.pipeline, channels_last)
        image_side = image_components(self.pipeline)
        left_out = {} if max_sequence_length else dict.fromkeys(T5)
        self.text = TextEncoders(lambda: source.load(**image_side, **left_out), TEXT)
        self.max_sequence_length = max_sequence_length
        config = self.transformer.config
        self.conditioning_shapes = {
            "tokens": (CLIP_TOKENS + max_sequence_length, config.joint_attention_dim),
            "pooled": (config.pooled_projection_dim,),
        }
        self.conditioning_dtypes: Mapping[str, torch.dtype] = {}
        self.negative_prompt = "" if has_guidance else None
        self.embedding_key = f"{source.identity(TEXT)} {max_sequence_length}"
        self.latent_shape = self._latent_shape(resolution)
        self.image_size = height_and_width(resolution)

    def _latent_shape(self, resolution: Resolution) -> tuple[int, int, int]:
        """Return the latents' shape. Raises UserError for a resolution that the model cannot
        make.
        """
        config = self.transformer.config
        factor = self.pipeline.vae_scale_factor
        height, width = latent_size(resolution, factor, config.patch_size)
        # SD3 crops its positions from a table of fixed size, the number of patches along a side.
        max_side = config.pos_embed_max_size * config.patch_size
        if max(height, width) > max_side:
            raise UserError(
                f"model.resolution={show(resolution)} is more than the {max_side * factor} pixels "
                "a side that this model's positions reach"
            )
        return config.in_channels, height, width

    def to(self, device: torch.device) -> None:
        self.pipeline.to(device)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        pipeline = self.text.pipeline()
        # The same prompts go to all three encoders; negatives are encoded as prompts of their own.
        with quiet():
            tokens, _, pooled, _ = pipeline.encode_prompt(
                prompt=list(prompts),
                prompt_2=None,
                prompt_3=None,
                device=pipeline.text_encoder.device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.max_sequence_length,
            )
        return Conditioning({"tokens": tokens, "pooled": pooled})

    def truncated_part(self, prompt: str) -> str:
        clip_limit = self.text.pipeline().tokenizer_max_length
        limits = {"tokenizer": clip_limit, "tokenizer_2": clip_limit}
        if self.max_sequence_length:
            limits["tokenizer_3"] = self.max_sequence_length
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
        def forward(x: Tensor, conditioning: Conditioning) -> Tensor:
            # SD3 takes diffusers' timestep, 0 to 1000, as it is.
            output = self.transformer(
                x.to(weight_dtype(self.transformer)),
                conditioning.tensors["tokens"],
                conditioning.tensors["pooled"],
                per_row(sigma * 1000, x),
                return_dict=False,
            )
            return output[0].float()

        return classifier_free(forward, x, conditioning, guidance_scale)

    @torch.no_grad()
    def decode(self, x0: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        return self.decode_with_graph(x0)

    def decode_with_graph(self, x0: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        return to_images(unscale(x0, self.vae), self.vae)

    @torch.no_grad()
    def encode_images(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        return scale(from_images(images, self.vae), self.vae)
