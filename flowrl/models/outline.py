"""The networks of a model that are trained, made on PyTorch's meta device from configurations
alone, so that they can be compared with a LoRA or with other settings before minutes of loading.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from torch import nn

from flowrl.models.architectures import is_listed, on_meta
from flowrl.models.experts import NETWORK, as_one
from flowrl.models.loading import META, entry_of, read_index, resolve

OWN = "flowrl.models."
"""The beginning of the names of models whose `pretrained` is a pipeline of diffusers. In another
package's the key may mean anything.
"""


def outline(model: Mapping[str, Any]) -> nn.Module | None:
    """Make the network that a configuration's `model` trains, or all of several as one, in float32
    and without weights.

    Returns None where only loading can tell: for models of another package, for a network that is
    not of diffusers' own classes, and for configurations that are damaged or of another family.
    Raises UserError where the pipeline is not to be had.
    """
    target = str(model.get("_target_"))
    pretrained = str(model.get("pretrained") or META)
    if not target.startswith(OWN) or pretrained.startswith(META):
        return None
    source = resolve(pretrained)
    if not _is_of_family(target, source):
        return None
    return _transformer(source, pretrained, model.get("revision"))


def _is_of_family(target: str, source: str) -> bool:
    """Tell whether a local folder's pipeline is of the class that a model loads; that of a hub id
    may be. A model that loads any class has no `pipeline_class`.
    """
    module, _, name = target.rpartition(".")
    expected = getattr(getattr(importlib.import_module(module), name), "pipeline_class", None)
    if expected is None or not os.path.isdir(source):
        return True
    is_same: bool = read_index(source, source, None).get("_class_name") == expected.__name__
    return is_same


def _transformer(source: str, pretrained: str, revision: str | None) -> nn.Module | None:
    """Make the network or networks of a pipeline; None as `outline` does."""
    networks: dict[str, nn.Module] = {}
    index = {} if _is_known(source) else read_index(source, pretrained, revision)
    try:
        if _is_known(source):
            return on_meta(source, torch.float32)
        for name in sorted(filter(NETWORK.fullmatch, index)):
            entry = entry_of(index, name)
            if entry is not None:
                networks[name] = _network(source, revision, name, *entry)
    # A class takes what a configuration says as it comes, and fails in ways of its own where that
    # is damaged; loading names the component.
    except Exception:
        return None
    return as_one(networks) if networks else None


def _is_known(source: str) -> bool:
    """Tell whether the architecture of a hub id or of a readable folder is listed."""
    try:
        return is_listed(source)
    except (OSError, AttributeError):
        return False


def _network(source: str, revision: str | None, name: str, library: str, kind: str) -> nn.Module:
    """Make one network from its configuration.

    Raises TypeError for a class of another library, and what the class raises.
    """
    if library != "diffusers":
        raise TypeError(f"{library}.{kind} is no class of diffusers")
    network_class: Any = getattr(diffusers, kind)
    config = network_class.load_config(source, subfolder=name, revision=revision)
    with torch.device("meta"):
        network: nn.Module = network_class.from_config(config)
    return network
