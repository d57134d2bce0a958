"""Stable Diffusion 3 and 3.5, and the embedded shapes model: an adapter over `StableDiffusion3Pipeline`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from jaxtyping import Float
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from flowrl.models.loading import load_pipeline
from flowrl.models.lora import ADAPTER, adapter_config
from flowrl.types import Conditioning


class SD3:
    """A pipeline in diffusers layout, from a local folder or a hub id.

    `max_sequence_length` is the number of T5 tokens; 0 leaves the T5 encoder out. `resolution` is the image side in
    pixels. With `has_guidance` False negative prompts are not encoded and guidance is refused.
    """

    def __init__(
        self,
        *,
        pretrained: str,
        revision: str | None,
        dtype: str,
        resolution: int,
        max_sequence_length: int,
        has_guidance: bool,
        channels_last: bool,
    ) -> None:
        left_out = () if max_sequence_length else ("text_encoder_3", "tokenizer_3")
        self.pipeline: Any = load_pipeline(
            StableDiffusion3Pipeline, pretrained, revision=revision, dtype=dtype, left_out=left_out
        )
        self.transformer = self.pipeline.transformer.requires_grad_(False)
        self._vae = self.pipeline.vae.requires_grad_(False).eval()
        if channels_last:
            self._vae.to(memory_format=torch.channels_last)
        self.max_sequence_length = max_sequence_length
        self.has_guidance = has_guidance
        side = resolution // self.pipeline.vae_scale_factor
        self.latent_shape = (self.transformer.config.in_channels, side, side)

    def to(self, device: torch.device) -> None:
        self.pipeline.to(device)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        tokens, negative_tokens, pooled, negative_pooled = self.pipeline.encode_prompt(
            list(prompts),
            None,
            None,
            device=self.transformer.device,
            do_classifier_free_guidance=self.has_guidance,
            max_sequence_length=self.max_sequence_length,
        )
        negative = Conditioning(negative_tokens, negative_pooled) if self.has_guidance else None
        return Conditioning(tokens, pooled, negative)

    def velocity(
        self, x: Float[Tensor, "B C H W"], sigma: float, conditioning: Conditioning, guidance_scale: float
    ) -> Float[Tensor, "B C H W"]:
        if guidance_scale == 1:
            return self._forward(x, sigma, conditioning.tokens, conditioning.pooled)
        negative = conditioning.negative
        if negative is None:
            raise ValueError(f"guidance_scale={guidance_scale} needs model.has_guidance=true")
        tokens = torch.cat([negative.tokens, conditioning.tokens])
        pooled = torch.cat([negative.pooled, conditioning.pooled])
        unconditional, conditional = self._forward(torch.cat([x, x]), sigma, tokens, pooled).chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    def _forward(self, x: Tensor, sigma: float, tokens: Tensor, pooled: Tensor) -> Tensor:
        dtype = self.transformer.dtype
        timestep = torch.full((len(x),), sigma * 1000, dtype=torch.float32, device=x.device)
        return self.transformer(x.to(dtype), tokens, pooled, timestep, return_dict=False)[0].float()

    @torch.no_grad()
    def decode(self, x0: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 3 S S"]:
        config = self._vae.config
        latents = (x0 / config.scaling_factor + config.shift_factor).to(self._vae.dtype)
        return (self._vae.decode(latents, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    def save_lora(self, folder: Path) -> None:
        self.pipeline.save_lora_weights(
            folder,
            transformer_lora_layers=get_peft_model_state_dict(self.transformer, adapter_name=ADAPTER),
            transformer_lora_adapter_metadata=adapter_config(self.transformer),
        )
