"""Latents are turned from what the rest of FlowRL sees, (B, C, h, w), into what transformers and
autoencoders take, and back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from flowrl.errors import UserError
from flowrl.values.bounds import Resolution
from flowrl.values.sizes import height_and_width
from flowrl.values.wording import show


def latent_size(resolution: Resolution, factor: int, patch: int) -> tuple[int, int]:
    """Return height and width of the latents of an image, `factor` pixels each, which patches of
    `patch` must tile.

    Raises UserError naming the nearest sides that work.
    """
    unit = factor * patch
    sizes = height_and_width(resolution)
    for side in sizes:
        if side < unit or side % unit:
            below = max(side // unit, 1) * unit
            of_two = "" if isinstance(resolution, int) else f": {side}"
            raise UserError(
                f"model.resolution={show(resolution)}{of_two} must be a multiple of {unit} for "
                f"this model, such as {below} or {below + unit}"
            )
    height, width = sizes
    return height // factor, width // factor


def pack(x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B N Q"]:
    """Return tokens of 2x2 patches, row by row, channels first within a token, as FLUX.1 and FLUX.2
    take them.
    """
    patches = functional.pixel_unshuffle(x, 2)  # [B, 4 C, h / 2, w / 2]
    return patches.flatten(2).transpose(1, 2)


def unpack(tokens: Float[Tensor, "B N Q"], size: Sequence[int]) -> Float[Tensor, "B C h w"]:
    """Undo `pack` for latents of this height and width."""
    height, width = size
    patches = tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2))  # [B, 4 C, h/2, w/2]
    return functional.pixel_shuffle(patches, 2)


def token_positions(
    size: Sequence[int], num_axes: int, device: torch.device
) -> Float[Tensor, "N A"]:
    """Return row and column of every packed token of latents of this height and width, as axes 1
    and 2 of `num_axes`, with 0 on the others.
    """
    height, width = size
    positions = torch.zeros(height // 2, width // 2, num_axes, device=device)
    positions[..., 1] = torch.arange(height // 2, device=device)[:, None]
    positions[..., 2] = torch.arange(width // 2, device=device)
    return positions.flatten(0, 1)


def weight_dtype(network: nn.Module) -> torch.dtype:
    """Return the dtype of a network's first floating-point weight, which its input is cast to.

    `network.dtype` of diffusers says the same of networks that keep no weights in float32 beside
    those of another dtype, but asks every module for hooks that FlowRL does not set, which at each
    call of the embedded model took 2 % of an iteration.
    """
    return next(weight.dtype for weight in network.parameters() if weight.is_floating_point())


def per_row(value: float, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B"]:
    """Return one number for every row of x, in float32 whatever the network's dtype."""
    return torch.full((len(x),), value, dtype=torch.float32, device=x.device)


def unscale(x: Float[Tensor, "B C h w"], vae: Any) -> Float[Tensor, "B C h w"]:
    """Undo the scaling and shift of SD3's and FLUX.1's latents, which are (z - shift) scale of the
    autoencoder's z.
    """
    return x / vae.config.scaling_factor + vae.config.shift_factor


def scale(z: Float[Tensor, "B C h w"], vae: Any) -> Float[Tensor, "B C h w"]:
    """Return SD3's and FLUX.1's latents of the autoencoder's z; `unscale` undoes it."""
    return (z - vae.config.shift_factor) * vae.config.scaling_factor


def to_images(latents: Float[Tensor, "B C h w"], vae: Any) -> Float[Tensor, "B 3 H W"]:
    """Return the autoencoder's images in [0, 1], float32."""
    decoded = vae.decode(latents.to(weight_dtype(vae)), return_dict=False)[0]
    # The autoencoder's images are in [-1, 1], about; it may overshoot.
    return (decoded.float() / 2 + 0.5).clamp(0, 1)


def from_images(images: Float[Tensor, "B 3 H W"], vae: Any) -> Float[Tensor, "B C h w"]:
    """Return the means of the autoencoder's latents of images in [0, 1], float32."""
    scaled = images * 2 - 1
    return vae.encode(scaled.to(weight_dtype(vae))).latent_dist.mode().float()
