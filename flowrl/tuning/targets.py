"""The layers that a LoRA adapts where the configuration leaves it to the transformer's class:
`lora.targets=auto`.

The default is every linear layer of every attention, by the names that diffusers' transformers give
attentions. Where a family's published recipe differs, its class has a row in the table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from flowrl.errors import UserError
from flowrl.models.experts import networks_of

AUTO = "auto"

_PROJECTIONS = r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
_FLUX2 = (
    rf"(.*\.({_PROJECTIONS}|ff(_context)?\.linear_(in|out))"
    r"|single_.*\.attn\.(to_qkv_mlp_proj|to_out))"
)

_FEED_FORWARD = r"net\.(0\.proj|2)"
_WITH_FEED_FORWARD = rf".*\.({_PROJECTIONS}|ff(_context)?\.{_FEED_FORWARD})"

PUBLISHED: Mapping[str, str] = {
    # flow_grpo's recipe, with the feed-forward layers.
    "FluxTransformer2DModel": _WITH_FEED_FORWARD,
    # Flow-Factory's recipe and the single blocks' to_out, as in conf/model.
    "Flux2Transformer2DModel": _FLUX2,
    # UniRL's recipe (hunyuan_video10), the token refiner's layers among them.
    "HunyuanVideoTransformer3DModel": _WITH_FEED_FORWARD,
    # verl-omni's recipe; Flow-Factory means the same, with a misspelt name that matches nothing.
    "QwenImageTransformer2DModel": rf".*\.({_PROJECTIONS}|(img|txt)_mlp\.{_FEED_FORWARD})",
    # Flow-Factory's recipe, the refiners' layers among them.
    "ZImageTransformer2DModel": r".*\.(attention\.to_([qkv]|out\.0)|feed_forward\.w[123])",
}
"""The layers of published recipes, as regular expressions, by the transformer's class."""

ATTENTION = re.compile(r"(.*\.)?(\w*attn\d*|\w*attention\d*)\.(?!.*norm).+")
"""The name of a layer inside an attention, norms left out."""


def targets_of(transformer: nn.Module) -> list[str]:
    """Return the names of the layers that `auto` stands for, in the transformer's order.

    Raises UserError where a network of it has no layer that looks like an attention's.
    """
    names = []
    for prefix, network in networks_of(transformer).items():
        names += [f"{prefix}{name}" for name in _targets_of(network)]
    return names


def _targets_of(transformer: nn.Module) -> list[str]:
    """Return the names of one network's layers."""
    kind = type(transformer).__name__
    pattern = re.compile(PUBLISHED[kind]) if kind in PUBLISHED else ATTENTION
    names = [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and pattern.fullmatch(name)
    ]
    if not names:
        raise UserError(
            f"lora.targets=auto finds no attention in a {kind}; name the layers, as a regular "
            "expression or a list"
        )
    return names
