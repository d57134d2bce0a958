"""A LoRA of a pipeline's several networks: one set of layers, whose names begin with the network's,
and a file for each network, as stock pipelines load them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from glob import escape
from pathlib import Path
from typing import Any

from torch import Tensor

from flowrl.models.experts import FIRST, NETWORK
from flowrl.tuning.lora_file import LoRAFile


def network_of(layer: str) -> str | None:
    """Return the network that a layer's name begins with, as those of a pipeline's several networks
    do; None for a layer of a single one.
    """
    network = layer.partition(".")[0]
    return network if NETWORK.fullmatch(network) else None


def companion_of(file: Path, network: str) -> Path:
    """Return the file of another network's layers beside `file`, which holds the first one's: stock
    pipelines load one network's from a file.
    """
    return file.with_name(f"{file.stem}.{network}{file.suffix}")


def companions_of(file: Path) -> dict[str, Path]:
    """Return the files of other networks' layers that lie beside a LoRA file, by network."""
    pattern = f"{escape(file.stem)}.{FIRST}_[0-9]*{file.suffix}"
    places = sorted(file.parent.glob(pattern))
    return {place.stem.rpartition(".")[2]: place for place in places}


def is_companion(file: Path) -> bool:
    """Tell whether a file is named as another network's beside the first one's."""
    stem, _, network = file.stem.rpartition(".")
    return bool(stem) and network != FIRST and NETWORK.fullmatch(network) is not None


def name_first(table: dict[str, Any]) -> None:
    """Let the names of all layers begin with their network's where some do: the others are those of
    the first network.
    """
    if any(map(network_of, table)):
        for name in list(table):
            if network_of(name) is None:
                table[f"{FIRST}.{name}"] = table.pop(name)


def joined(first: LoRAFile, others: Mapping[str, LoRAFile]) -> LoRAFile:
    """Return the LoRA of the first network and those of others, by their names, as one; the first
    as it is where there are no others.
    """
    if not others:
        return first
    a: dict[str, Tensor] = {}
    b: dict[str, Tensor] = {}
    alpha: dict[str, float] = {}
    for network, lora_file in {FIRST: first, **others}.items():
        a |= {f"{network}.{name}": matrix for name, matrix in lora_file.a.items()}
        b |= {f"{network}.{name}": matrix for name, matrix in lora_file.b.items()}
        alpha |= {f"{network}.{name}": value for name, value in lora_file.alpha.items()}
    num_passed_over = sum(lora_file.num_passed_over for lora_file in (first, *others.values()))
    return replace(first, a=a, b=b, alpha=alpha, num_passed_over=num_passed_over)


def split(lora_file: LoRAFile) -> dict[str, LoRAFile]:
    """Return the LoRA of each network, under its layers' own names; one of a single network as it
    is.
    """
    networks: dict[str, dict[str, str]] = {}
    for layer in lora_file.a:
        network = network_of(layer)
        name = layer if network is None else layer.removeprefix(f"{network}.")
        networks.setdefault(network or FIRST, {})[name] = layer
    return {network: _part(lora_file, layers) for network, layers in networks.items()}


def _part(lora_file: LoRAFile, layers: Mapping[str, str]) -> LoRAFile:
    """Return some layers of a LoRA by new names; `layers` gives the present name of each."""
    a = {name: lora_file.a[layer] for name, layer in layers.items()}
    b = {name: lora_file.b[layer] for name, layer in layers.items()}
    # A layer that lacks an alpha gets none here either.
    has_alpha = {name: layer for name, layer in layers.items() if layer in lora_file.alpha}
    alpha = {name: lora_file.alpha[layer] for name, layer in has_alpha.items()}
    return replace(lora_file, a=a, b=b, alpha=alpha)
