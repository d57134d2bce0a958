"""Writing a LoRA in the formats of diffusers, peft and ComfyUI, and as peft's configuration of an
adapter.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from flowrl.errors import UserError
from flowrl.tuning.formats import LoRAFile
from flowrl.tuning.layer_names import METADATA, NAMES, PREFIXES, Format


def lora_config(given: LoRAFile) -> LoraConfig:
    """The adapter as peft takes it: the first layer's rank and alpha, and a pattern for each layer
    that differs.
    """
    ranks = given.ranks
    rank = next(iter(ranks.values()))
    alpha = next(iter(given.alpha.values()))
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft takes any number
        target_modules=_targets(given),
        rank_pattern={
            f"^{re.escape(name)}": value for name, value in ranks.items() if value != rank
        },
        alpha_pattern={
            f"^{re.escape(name)}": value for name, value in given.alpha.items() if value != alpha
        },
    )


def _targets(given: LoRAFile) -> list[str] | str:
    """The layers as peft takes them: as endings of names, or, where one is no part of a block, as
    whole names.

    An ending `proj_out` would be that of many blocks' layers too.
    """
    names = sorted(given.a)
    return names if all("." in name for name in names) else "|".join(map(re.escape, names))


def write(given: LoRAFile, folder: Path, form: Format) -> Path:
    """Write a LoRA into `folder` in one of the formats; returns the file."""
    if form not in get_args(Format):
        raise UserError(f"--format={form} must be one of {', '.join(get_args(Format))}")
    folder.mkdir(parents=True, exist_ok=True)
    prefix = PREFIXES[form]
    tensors = {
        f"{prefix}{name}.lora_A.weight": value.contiguous() for name, value in given.a.items()
    }
    tensors |= {
        f"{prefix}{name}.lora_B.weight": value.contiguous() for name, value in given.b.items()
    }
    metadata = {"format": "pt"}
    if form == "comfy":
        # Of rank-stabilised scaling, alpha may be a number that float32 would round.
        double = torch.float64
        tensors |= {
            f"{prefix}{name}.alpha": torch.tensor(alpha, dtype=double)
            for name, alpha in given.alpha.items()
        }
    else:
        config = _plain(lora_config(given))
        if form == "peft":
            (folder / "adapter_config.json").write_text(
                json.dumps(config, indent=2, sort_keys=True) + "\n"
            )
        else:
            metadata[METADATA] = json.dumps(
                {f"{prefix}{key}": value for key, value in config.items()}, sort_keys=True
            )
    save_file(tensors, folder / NAMES[form], metadata=metadata)
    return folder / NAMES[form]


def _plain(config: LoraConfig) -> dict[str, Any]:
    """peft's configuration as plain data, with sets as sorted lists."""
    plain = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in config.to_dict().items()
    }
    return {
        key: value
        for key, value in plain.items()
        if isinstance(value, (str, int, float, bool, list, dict))
    }
