"""Guidance: a second pass on the negative prompt, or a number that a distilled model takes as an
input.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from flowrl.errors import UserError
from flowrl.models.conditioning import concatenate
from flowrl.types import Conditioning

Forward = Callable[[Float[Tensor, "B *X"], Conditioning], Float[Tensor, "B *X"]]
"""(x, conditioning) -> velocity, one pass of the transformer."""


def classifier_free(
    forward: Forward, x: Float[Tensor, "B *X"], conditioning: Conditioning, scale: float
) -> Float[Tensor, "B *X"]:
    """Compute v_negative + scale (v - v_negative), in one pass of twice the rows; scale 1 is one
    plain pass.

    Raises UserError where the conditioning holds no negative prompt.
    """
    if scale == 1:
        return forward(x, conditioning)
    negative = conditioning.negative
    if negative is None:
        raise UserError(f"guidance_scale={scale} needs model.has_guidance=true")
    # One pass of 2 B rows, negatives first, as the stock pipeline of SD3 does it.
    both = concatenate([negative, conditioning])
    velocities = forward(torch.cat([x, x]), both)
    unconditional, conditional = velocities.chunk(2)
    return unconditional + scale * (conditional - unconditional)


def check_embedded(has_guidance: bool, is_embedded: bool, kind: str) -> None:
    """Raise UserError, naming the key, unless the setting is what a distilled model does, which
    takes guidance as an input or not at all.
    """
    if has_guidance != is_embedded:
        takes = "takes a guidance scale as an input" if is_embedded else "takes no guidance scale"
        # YAML writes booleans small.
        value = str(has_guidance).lower()
        remedy = str(is_embedded).lower()
        raise UserError(f"model.has_guidance={value}, but this {kind} {takes}: set it to {remedy}")
