"""Checks of a network's weights before they are used, saved or exported: all are there, and all are
numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from flowrl.errors import NotFinite

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The dtypes that weights may have, by their names in a configuration."""

ADAPTER_MARKS = (".base_layer.", ".lora_", ".lora.")
"""Stand in the names of a network's weights where an adapter is attached to it."""


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that holds a NaN or an infinity, None where all are
    numbers.

    This takes one fused norm and one wait for the device where all is well. Divided tensors are
    looked at whole, so that all processes, which must call this alike, get the same answer.
    """
    floating = {
        name: value
        for name, value in tensors.items()
        if value.is_floating_point() and value.numel()
    }
    if not floating or _has_finite_norm(list(floating.values())):
        return None
    return next(name for name, value in floating.items() if not _has_finite_norm([value]))


def require_finite(weights: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise NotFinite, naming the first tensor that holds a NaN or an infinity.

    `weights` are tensors by kind and name. The check must come before weights are evaluated, saved
    or exported, in all processes alike.
    """
    named = {
        f"{kind} {name}": value
        for kind, tensors in weights.items()
        for name, value in tensors.items()
    }
    if first := first_not_finite(named):
        kind, _, name = first.partition(" ")
        raise NotFinite(
            f"the weight {name} ({kind}) holds NaN or infinity, so it is not evaluated, saved or "
            "exported"
        )


@torch.no_grad()
def _has_finite_norm(tensors: list[Tensor]) -> bool:
    # The norm is a maximum, which NaN and infinity pass through; a sum of squares of large finite
    # numbers would overflow.
    norm = get_total_norm(tensors, norm_type=math.inf)
    whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return bool(whole.isfinite())


def fault(network: nn.Module, info: Mapping[str, Any]) -> str | None:
    """Say what is wrong with a network that `from_pretrained` has just loaded; None where nothing
    is.

    `info` is what it returns with `output_loading_info=True`: diffusers leaves missing weights
    without values, and transformers draws them at random. Weights that have no place are a fault
    only beside missing ones.
    """
    names = list(network.state_dict())
    if missing := set(info["missing_keys"]):
        # The first in the network's order; a name that transformers alone knows is in none.
        first = next((name for name in names if name in missing), min(missing))
        text = f"{len(missing)} of its {len(names)} weights are missing, the first {first!r}"
        num_attached = sum(map(_is_adapters, info["unexpected_keys"]))
        if num_attached:
            return f"{text}, and {num_attached} of an attached adapter are there instead"
        return text
    if mismatched := sorted(info["mismatched_keys"]):
        name, shape, wanted = mismatched[0]
        return (
            f"{len(mismatched)} of its {len(names)} weights have another shape than config.json "
            f"says, the first {name!r} {tuple(shape)} instead of {tuple(wanted)}"
        )
    if name := first_not_finite(network.state_dict()):
        return f"its weight {name!r} holds NaN or infinity"
    return None


def has_adapter(info: Mapping[str, Any]) -> bool:
    """Tell whether a network's weights were saved with an adapter attached, so that the base's have
    other names.
    """
    return any(map(_is_adapters, info["unexpected_keys"]))


def _is_adapters(name: str) -> bool:
    """Tell whether a weight's name is that of an adapter, or of a layer that has one."""
    return any(mark in name for mark in ADAPTER_MARKS)
