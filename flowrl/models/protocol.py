"""The interface of a base model: encode prompts, evaluate the velocity field, decode latents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flowrl.types import Conditioning


@runtime_checkable
class FlowModel(Protocol):
    """No loop and no loss lives here; `transformer` is the network that is trained."""

    transformer: nn.Module
    latent_shape: tuple[int, int, int]

    def to(self, device: torch.device) -> object:
        """Move every network."""
        ...

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """One row a prompt, with the negative prompt's embeddings where guidance may be used."""
        ...

    def velocity(
        self, x: Float[Tensor, "B C H W"], sigma: float, conditioning: Conditioning, guidance_scale: float
    ) -> Float[Tensor, "B C H W"]:
        """noise - data, float32; guidance_scale 1 means no guidance and one forward pass."""
        ...

    def decode(self, x0: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 3 S S"]:
        """Images in [0, 1], float32."""
        ...

    def save_lora(self, folder: Path) -> None:
        """Write the adapter so that the stock pipeline's `load_lora_weights(folder)` takes it."""
        ...
