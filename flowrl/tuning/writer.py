"""A LoRA is written in the formats of diffusers, peft and ComfyUI, and turned into peft's
configuration of an adapter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from flowrl.errors import UserError
from flowrl.models.experts import FIRST
from flowrl.tuning.layer_names import METADATA, NAMES, PREFIXES, Format
from flowrl.tuning.lora_file import LoRAFile
from flowrl.tuning.metadata import modelspec, stamp
from flowrl.tuning.networks import companion_of, split


def lora_config(lora_file: LoRAFile) -> LoraConfig:
    """Return the adapter as peft takes it: the first layer's rank and alpha, and a pattern for each
    layer that differs.
    """
    ranks = lora_file.ranks
    # Any layer's would do as the common ones; a plain LoRA then needs no pattern.
    rank = next(iter(ranks.values()))
    alpha = next(iter(lora_file.alpha.values()))
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft takes any number
        target_modules=_targets(lora_file),
        rank_pattern=_pattern(ranks, rank),
        alpha_pattern=_pattern(lora_file.alpha, alpha),
    )


def _pattern(values: Mapping[str, float], common: float) -> dict[str, Any]:
    """Return the values of the layers that have another than the common one, by a pattern of the
    layer's name.
    """
    others = {name: value for name, value in values.items() if value != common}
    return {pattern_of(name): value for name, value in others.items()}


def pattern_of(name: str) -> str:
    """Return peft's pattern of one layer, by its whole name."""
    # peft matches a pattern with the end of a name, unless it is anchored at the beginning too.
    return f"^{re.escape(name)}"


def _targets(lora_file: LoRAFile) -> list[str] | str:
    """Return the layers as peft takes them: as endings of names, or, where one is no part of a
    block, as whole names.

    An ending `proj_out` would be that of many blocks' layers too.
    """
    names = sorted(lora_file.a)
    if all("." in name for name in names):
        return names
    # A text is a regular expression that peft matches with the whole of a name.
    return "|".join(map(re.escape, names))


def write(lora_file: LoRAFile, folder: Path, form: Format, day: str | None = None) -> Path:
    """Write a LoRA into `folder`, which is made where it is missing, in one of the formats, and
    return the file; of a pipeline with several networks that of the first, with the others beside
    it.

    With `day`, on which the LoRA was trained, a file for ComfyUI has ModelSpec's metadata. Raises
    UserError for a format that is none of them.
    """
    forms = get_args(Format)
    if form not in forms:
        raise UserError(f"--format={form} must be one of {', '.join(forms)}")
    by_network = split(lora_file)
    if form == "peft" and len(by_network) > 1:
        raise UserError(
            f"--format=peft is for one network, and this LoRA is of {' and '.join(by_network)}; "
            "choose diffusers or comfy"
        )
    folder.mkdir(parents=True, exist_ok=True)
    first = folder / NAMES[form]
    for network, content in by_network.items():
        file = first if network == FIRST else companion_of(first, network)
        _write_file(content, file, form, day)
    return first


def _write_file(lora_file: LoRAFile, file: Path, form: Format, day: str | None) -> None:
    """Write the LoRA of one network."""
    prefix = PREFIXES[form]
    tensors = _matrices(lora_file, prefix)
    metadata = {"format": "pt", **lora_file.notes}
    # Each program looks for the scale elsewhere.
    if form == "comfy":
        if day is not None:
            metadata |= modelspec(lora_file.notes, day)
        for name, alpha in lora_file.alpha.items():
            # Of rank-stabilised scaling, alpha may be a number that float32 would round.
            tensors[f"{prefix}{name}.alpha"] = torch.tensor(alpha, dtype=torch.float64)
    elif form == "peft":
        text = json.dumps(_json_settings(lora_file), indent=2, sort_keys=True)
        file.with_name("adapter_config.json").write_text(f"{text}\n")
    else:
        settings = _json_settings(lora_file)
        prefixed = {f"{prefix}{key}": value for key, value in settings.items()}
        metadata[METADATA] = json.dumps(prefixed, sort_keys=True)
    save_file(tensors, file)
    stamp(file, metadata)


def _matrices(lora_file: LoRAFile, prefix: str) -> dict[str, Tensor]:
    """Return the matrices under peft's names, contiguous, as safetensors takes them."""
    tensors = {}
    for name, value in lora_file.a.items():
        tensors[f"{prefix}{name}.lora_A.weight"] = value.contiguous()
    for name, value in lora_file.b.items():
        tensors[f"{prefix}{name}.lora_B.weight"] = value.contiguous()
    return tensors


def plain_settings(config: LoraConfig) -> dict[str, Any]:
    """Return peft's configuration as plain data, with sets as sorted lists.

    Sets have an order of their own in every process, so that two exports would differ.
    """
    settings = config.to_dict()
    for key, value in settings.items():
        if isinstance(value, set):
            settings[key] = sorted(value)
    return settings


def _json_settings(lora_file: LoRAFile) -> dict[str, Any]:
    """Return those of peft's settings that JSON can hold, and that are not null."""
    kinds = (str, int, float, bool, list, dict)
    settings = plain_settings(lora_config(lora_file))
    return {key: value for key, value in settings.items() if isinstance(value, kinds)}
