"""Writing a LoRA in the formats of diffusers, peft and ComfyUI, and as peft's configuration of an
adapter.
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

from flowrl.errors import UserError
from flowrl.runs.files import grant_usual_mode
from flowrl.tuning.formats import LoRAFile
from flowrl.tuning.layer_names import METADATA, NAMES, PREFIXES, Format


def lora_config(lora_file: LoRAFile) -> LoraConfig:
    """Return the adapter as peft takes it: the first layer's rank and alpha, and a pattern for each
    layer that differs.
    """
    ranks = lora_file.ranks
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
    return {f"^{re.escape(name)}": value for name, value in values.items() if value != common}


def _targets(lora_file: LoRAFile) -> list[str] | str:
    """Return the layers as peft takes them: as endings of names, or, where one is no part of a
    block, as whole names.

    An ending `proj_out` would be that of many blocks' layers too.
    """
    names = sorted(lora_file.a)
    if all("." in name for name in names):
        return names
    return "|".join(map(re.escape, names))


def write(lora_file: LoRAFile, folder: Path, form: Format) -> Path:
    """Write a LoRA into `folder` in one of the formats, and return the file."""
    if form not in get_args(Format):
        raise UserError(f"--format={form} must be one of {', '.join(get_args(Format))}")
    folder.mkdir(parents=True, exist_ok=True)
    prefix = PREFIXES[form]
    tensors = {f"{prefix}{name}.lora_A.weight": value for name, value in lora_file.a.items()}
    tensors |= {f"{prefix}{name}.lora_B.weight": value for name, value in lora_file.b.items()}
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    metadata = {"format": "pt"}
    # Each program looks for the scale elsewhere.
    if form == "comfy":
        for name, alpha in lora_file.alpha.items():
            # Of rank-stabilised scaling, alpha may be a number that float32 would round.
            tensors[f"{prefix}{name}.alpha"] = torch.tensor(alpha, dtype=torch.float64)
    elif form == "peft":
        text = json.dumps(_json_settings(lora_file), indent=2, sort_keys=True)
        (folder / "adapter_config.json").write_text(f"{text}\n")
    else:
        settings = _json_settings(lora_file)
        prefixed = {f"{prefix}{key}": value for key, value in settings.items()}
        metadata[METADATA] = json.dumps(prefixed, sort_keys=True)
    save_file(tensors, folder / NAMES[form], metadata=metadata)
    grant_usual_mode(folder / NAMES[form])
    return folder / NAMES[form]


def plain_settings(config: LoraConfig) -> dict[str, Any]:
    """Return peft's configuration as plain data, with sets as sorted lists."""
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
