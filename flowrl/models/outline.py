"""The networks of a pipeline that are trained, made on PyTorch's meta device from configurations
alone, so that they can be compared with a LoRA or with other settings before minutes of loading.
"""

from __future__ import annotations

import diffusers
import torch
from torch import nn

from flowrl.models.architectures import is_listed, on_meta
from flowrl.models.experts import NETWORK, as_one
from flowrl.models.loading import entry_of, read_index, resolve


def outline(pretrained: str, revision: str | None) -> nn.Module | None:
    """Make the network of a base model, or all of several as one, in float32 and without weights.

    Returns None where a network is not of diffusers' own classes, or does not come about on the
    meta device; then loading will tell. Raises UserError where the model is not to be had.
    """
    source = resolve(pretrained)
    try:
        if is_listed(source):
            return on_meta(source, torch.float32)
    except OSError:
        # A folder's configuration that cannot be read, which loading names.
        return None
    networks: dict[str, nn.Module] = {}
    index = read_index(source, pretrained, revision)
    for name in sorted(filter(NETWORK.fullmatch, index)):
        entry = entry_of(index, name)
        if entry is None:
            continue
        network = _network(source, revision, name, *entry)
        if network is None:
            return None
        networks[name] = network
    return as_one(networks) if networks else None


def _network(
    source: str, revision: str | None, name: str, library: str, kind: str
) -> nn.Module | None:
    """Make one network from its configuration; None as `outline` does."""
    network_class = getattr(diffusers, kind, None)
    if library != "diffusers" or network_class is None:
        return None
    try:
        config = network_class.load_config(source, subfolder=name, revision=revision)
        with torch.device("meta"):
            network: nn.Module = network_class.from_config(config)
    # The hub's errors and those of an unreadable file are of the first two kinds; a class that
    # reads its own weights while it is made raises the others.
    except (OSError, ValueError, RuntimeError, NotImplementedError):
        return None
    return network
