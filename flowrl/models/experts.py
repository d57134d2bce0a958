"""Several networks of one pipeline, of which its call picks one by the time, trained as one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from diffusers.loaders import PeftAdapterMixin
from torch import nn

FIRST = "transformer"
"""The component that every pipeline's trained network has, or the first of several."""
NETWORK = re.compile(rf"{FIRST}(_\d+)?")
"""The name of a component that is trained."""


class Experts(PeftAdapterMixin, nn.Module):
    """The trained networks of a pipeline that has several.

    They are children under the names of their components, so that a weight's name begins with its
    network's: `transformer.blocks.0...`, `transformer_2.blocks.0...`. Nothing is copied. There is
    no forward pass: the pipeline's call asks the network whose time it is. What diffusers' networks
    offer to whoever runs or adapts one holds here for all of them.
    """

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, network in networks.items():
            self.add_module(name, network)

    def _networks(self) -> list[Any]:
        return list(self.children())

    @property
    def is_gradient_checkpointing(self) -> bool:
        """True where one of the networks recomputes blocks in its backward pass."""
        return any(network.is_gradient_checkpointing for network in self._networks())

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the blocks of all networks in backward passes."""
        for network in self._networks():
            network.enable_gradient_checkpointing()

    def disable_gradient_checkpointing(self) -> None:
        """Keep the activations of all networks again."""
        for network in self._networks():
            network.disable_gradient_checkpointing()


def as_one(networks: Mapping[str, nn.Module]) -> nn.Module:
    """Return what is trained as one module: the only network itself, or all of several."""
    if len(networks) == 1:
        return next(iter(networks.values()))
    return Experts(networks)


def components_of(pipeline: Any) -> dict[str, nn.Module]:
    """Return the networks of a pipeline that are trained, by component, the first one first."""
    return {
        name: component
        for name, component in sorted(pipeline.components.items())
        if NETWORK.fullmatch(name) and isinstance(component, nn.Module)
    }


def networks_of(transformer: nn.Module) -> dict[str, nn.Module]:
    """Return the networks of what is trained, by what their weights' names begin with there: of a
    single one itself, under the empty text.
    """
    if isinstance(transformer, Experts):
        return {f"{name}.": network for name, network in transformer.named_children()}
    return {"": transformer}
