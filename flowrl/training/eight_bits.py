"""AdamW with its state in 8 bits (Dettmers et al. 2022, arXiv 2110.02861), by bitsandbytes."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from flowrl.errors import UserError
from flowrl.values.bounds import Betas, LearningRate, NonNegative, Rate


def require() -> Any:
    """Import the module of 8-bit optimizers. Raises UserError naming the extra that brings it."""
    try:
        return import_module("bitsandbytes.optim")
    except ModuleNotFoundError as error:
        raise UserError(
            f"optimizer=adamw_8bit needs the package {error.name!r}; install it with: pip install "
            "'flowrl-lightning[optim]'"
        ) from error


def adamw(
    params: Iterable[Tensor],
    *,
    lr: LearningRate,
    betas: Betas,
    weight_decay: NonNegative,
    eps: Rate,
) -> Optimizer:
    """Make AdamW with both moments in 8 bits, of which each block of 256 weights has a scale of its
    own in float32: 2 1/32 bytes a weight in place of 8.

    Tensors of fewer than 4,096 weights, as a LoRA's narrow matrices, keep both in float32.

    Within a block the least second moment beside 0 is 3.25e-7 of the largest, so that weights whose
    gradients are a two-thousandth of their block's largest take other steps than in 32 bits, unless
    `eps` is as large as these gradients; docs/how-to/real_models.md says how far they went apart.

    torchao's AdamW8bit, which is PyTorch alone, compiles its step, takes no rate that is a plain
    number, and keeps its state in a class of tensors of its own, which safetensors does not hold.

    Raises UserError where bitsandbytes is not installed.
    """
    made: Optimizer = require().AdamW8bit(
        params, lr=lr, betas=tuple(betas), weight_decay=weight_decay, eps=eps
    )
    return made


def first_state(optimizer: Any) -> int:
    """Make the state that the optimizer's first step would, as on the meta device, where its
    kernels do not run; return its bytes.
    """
    tensors: dict[int, Tensor] = {}
    for place, group in enumerate(optimizer.param_groups):
        for number, weight in enumerate(group["params"]):
            optimizer.init_state(group, weight, place, number)
            values = optimizer.state[weight].values()
            # All weights have the same tables.
            tensors |= {id(value): value for value in values if isinstance(value, Tensor)}
    return sum(value.nbytes for value in tensors.values())
