"""The interface of a base model: encode prompts, evaluate the velocity field, decode latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from flowrl.types import Conditioning

Use = Literal["never", "sometimes", "always"]
"""How a model uses a prompt's picture."""


@runtime_checkable
class TextModel(Protocol):
    """The text side of a base model, which embedding prompts takes."""

    negative_prompt: str | None
    """The text that guidance steers away from, by a second pass; None where there never is one."""
    embedding_key: str
    """A text that differs wherever the same prompt would be embedded differently."""

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts, one row each, without negatives; load the text encoders where they are
        not.
        """
        ...

    def truncated_part(self, prompt: str) -> str:
        """Return the part of a prompt that an encoder does not see since it is too long, in words;
        empty where all see all of it.
        """
        ...

    def drop_text_encoders(self) -> None:
        """Free the text encoders; a later `encode_prompts` loads them again."""
        ...


@runtime_checkable
class EditModel(TextModel, Protocol):
    """The text side of a base model that edits pictures, too."""

    use: Use

    def encode_edits(self, prompts: Sequence[str], pictures: Sequence[Image.Image]) -> Conditioning:
        """Encode prompts with a picture each, as `encode_prompts` does."""
        ...


@runtime_checkable
class FlowModel(TextModel, Protocol):
    """A base model, with neither loop nor loss; `transformer` is the network that is trained."""

    pipeline: Any
    """The stock pipeline of diffusers, which writes the files of a LoRA on its transformer."""
    transformer: nn.Module
    vae: nn.Module
    latent_shape: tuple[int, ...]
    conditioning_shapes: Mapping[str, tuple[int, ...]]
    """The shape of one row of each tensor of the conditioning, for plans of memory."""
    conditioning_dtypes: Mapping[str, torch.dtype]
    """The dtypes of those of these tensors that do not have the transformer's."""

    def to(self, device: torch.device) -> object:
        """Move every network but the text encoders, which have a place of their own."""
        ...

    def velocity(
        self,
        x: Float[Tensor, "B *X"],
        sigma: float,
        conditioning: Conditioning,
        guidance_scale: float,
    ) -> Float[Tensor, "B *X"]:
        """Return noise - data, float32. A guidance_scale of 1 is one pass without guidance; a
        distilled model takes any scale as an input of its one pass.
        """
        ...

    def decode(self, x0: Float[Tensor, "B *X"]) -> Float[Tensor, "B *F 3 H W"]:
        """Return images [B, 3, H, W], or clips [B, F, 3, H, W] of F frames in the order of time, F
        above 1; in [0, 1], float32.
        """
        ...


@runtime_checkable
class DecodesWithGraph(FlowModel, Protocol):
    """A base model that a loss of kind direct can train, since gradients go through its
    autoencoder.
    """

    def decode_with_graph(self, x0: Float[Tensor, "B *X"]) -> Float[Tensor, "B *F 3 H W"]:
        """Decode as `decode` does, and keep the graph from x0 to the images where autograd is on.
        Where an image is cut off at 0 or 1, its gradient is 0.
        """
        ...


@runtime_checkable
class EncodesImages(FlowModel, Protocol):
    """A base model whose latents of real images can be trained on."""

    image_size: tuple[int, int]
    """Height and width in pixels of the images that it draws."""

    def encode_images(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B *X"]:
        """Return the latents of images of `image_size` in [0, 1], float32, on the autoencoder's
        device and without a graph; `decode` leads back to the images.
        """
        ...
