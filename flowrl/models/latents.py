"""Latents are turned from what the rest of FlowRL sees, (B, C, H, W), into what transformers and
autoencoders take, and back.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from flowrl.errors import UserError


def latent_side(resolution: int, factor: int, patch: int) -> int:
    """Return height and width of the latents of a square image, `factor` pixels each, which patches
    of `patch` must tile.

    Raises UserError naming the nearest resolutions that work.
    """
    unit = factor * patch
    if resolution < unit or resolution % unit:
        below = max(resolution // unit, 1) * unit
        raise UserError(
            f"model.resolution={resolution} must be a multiple of {unit} for this model, such as "
            f"{below} or {below + unit}"
        )
    return resolution // factor


def pack(x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B N Q"]:
    """Return tokens of 2x2 patches, row by row, channels first within a token, as FLUX.1 and FLUX.2
    take them.
    """
    patches = functional.pixel_unshuffle(x, 2)  # [B, 4 C, H / 2, W / 2]
    return patches.flatten(2).transpose(1, 2)


def unpack(tokens: Float[Tensor, "B N Q"], side: int) -> Float[Tensor, "B C h w"]:
    """Undo `pack` for square latents of `side`."""
    rows = side // 2
    patches = tokens.transpose(1, 2).unflatten(2, (rows, rows))  # [B, 4 C, H / 2, W / 2]
    return functional.pixel_shuffle(patches, 2)


def token_positions(side: int, num_axes: int, device: torch.device) -> Float[Tensor, "N A"]:
    """Return row and column of every packed token, as axes 1 and 2 of `num_axes`, with 0 on the
    others.
    """
    num_rows = side // 2
    positions = torch.zeros(num_rows, num_rows, num_axes, device=device)
    steps = torch.arange(num_rows, device=device)
    positions[..., 1] = steps[:, None]
    positions[..., 2] = steps
    return positions.flatten(0, 1)


def per_row(value: float, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B"]:
    """Return one number for every row of x, in float32 whatever the network's dtype."""
    return torch.full((len(x),), value, dtype=torch.float32, device=x.device)


def unscale(x: Float[Tensor, "B C h w"], vae: Any) -> Float[Tensor, "B C h w"]:
    """Undo the scaling and shift of SD3's and FLUX.1's latents, which are (z - shift) scale of the
    autoencoder's z.
    """
    return x / vae.config.scaling_factor + vae.config.shift_factor


def to_images(latents: Float[Tensor, "B C h w"], vae: Any) -> Float[Tensor, "B 3 H W"]:
    """Return the autoencoder's images in [0, 1], float32."""
    decoded = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    # The autoencoder's images are in [-1, 1], about; it may overshoot.
    return (decoded.float() / 2 + 0.5).clamp(0, 1)
