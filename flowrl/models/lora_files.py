"""LoRA files: reading and writing the formats of diffusers, peft and ComfyUI, and attaching what was read.

A file that names layers which the transformer does not have is refused: loaders that skip them silently draw with the
base model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from flowrl.errors import UserError
from flowrl.models import lora

Format = Literal["diffusers", "peft", "comfy"]
NAMES: Mapping[Format, str] = {
    "diffusers": "pytorch_lora_weights.safetensors",
    "peft": "adapter_model.safetensors",
    "comfy": "lora.safetensors",
}
PREFIXES: Mapping[Format, str] = {
    "diffusers": "transformer.",
    "peft": "base_model.model.",
    "comfy": "transformer.",
}
"""ComfyUI knows the layers of SD3, FLUX.1 and FLUX.2 under diffusers' names, and reads alpha from a tensor each."""

METADATA = "lora_adapter_metadata"
_KEY = re.compile(r"(?:(?:transformer|base_model\.model|diffusion_model)\.)?(.+)\.lora_(A|B|down|up)\.(\w+\.)?weight")
_ALPHA = re.compile(r"(?:(?:transformer|base_model\.model|diffusion_model)\.)?(.+)\.alpha")


@dataclass(frozen=True, slots=True)
class LoRAFile:
    """Per layer the matrices A (rank, in) and B (out, rank) and alpha: the layer adds alpha / rank B A x."""

    a: Mapping[str, Tensor]
    b: Mapping[str, Tensor]
    alpha: Mapping[str, float]


def read(path: Path, alpha: float | None = None) -> LoRAFile:
    """A LoRA from a file, or from a folder that holds one; `alpha` is that of a file which tells none.

    Raises ValueError where there is none, or half of one, or where its scale cannot be known: a file that was exported
    for others tells alpha or means the rank, a checkpoint's weights, whose keys name an adapter, tell nothing.
    """
    file = _find(path)
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            metadata = json.loads((opened.metadata() or {}).get(METADATA, "{}"))
    except SafetensorError as error:
        raise UserError(f"{file} is damaged ({error}); export it again") from error
    matrices: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}}
    alphas: dict[str, float] = {}
    has_adapter = False
    for key, tensor in tensors.items():
        if match := _KEY.fullmatch(key):
            matrices[{"down": "A", "up": "B"}.get(match[2], match[2])][match[1]] = tensor.float()
            has_adapter |= match[3] is not None
        elif match := _ALPHA.fullmatch(key):
            alphas[match[1]] = float(tensor)
        else:
            raise UserError(f"{file}: {key!r} is no LoRA weight; give a file of lora_A and lora_B matrices")
    a, b = matrices["A"], matrices["B"]
    if not a or a.keys() != b.keys():
        odd = sorted(a.keys() ^ b.keys())
        raise UserError(f"{file}: {f'{odd[0]} has only one of its two matrices' if odd else 'no LoRA weights in it'}")
    config = {key.removeprefix("transformer."): value for key, value in metadata.items()} or _peft_config(file)
    if odd := [key for key in ("use_rslora", "alpha_pattern") if config.get(key)]:
        raise UserError(f"{file}: {odd[0]}={config[odd[0]]} is a way of scaling that is not read here")
    default = config.get("lora_alpha", alpha)
    if default is None and has_adapter and not alphas:
        raise UserError(
            f"{file} does not tell its alpha, as checkpoints do not; python scripts/export_lora.py RUN exports a run's"
        )
    return LoRAFile(a, b, {name: alphas.get(name, float(default or a[name].shape[0])) for name in a})


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such file; give a LoRA file, or the lora/ folder of a run")
    if lora.whole_files(path) or lora.whole_files(path / lora.WHOLE_FOLDER):
        raise UserError(f"{path} holds a whole transformer, as full fine-tuning trains it, and no LoRA")
    found = [path / name for name in NAMES.values() if (path / name).is_file()] or sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise UserError(f"{path}: {len(found)} LoRA files in this folder; give one by name")
    return found[0]


def _peft_config(file: Path) -> dict[str, Any]:
    config = file.with_name("adapter_config.json")
    return dict(json.loads(config.read_text())) if config.is_file() else {}


def check(given: LoRAFile, transformer: nn.Module, path: Path) -> None:
    """Raise ValueError unless every layer of the file is a linear layer of the transformer, of the same shape."""
    linear = {name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    shapes = {name: (given.b[name].shape[0], given.a[name].shape[1]) for name in given.a}
    odd = [name for name, shape in shapes.items() if name not in linear or tuple(linear[name].weight.shape) != shape]
    if odd:
        kind = type(transformer).__name__
        many = "none" if len(odd) == len(shapes) else f"only {len(shapes) - len(odd)}"
        raise UserError(
            f"{path}: {many} of its {len(shapes)} layers fit this {kind} (the first that does not: {odd[0]!r}); it is "
            "a LoRA of another architecture"
        )


def attach(given: LoRAFile, transformer: nn.Module, path: Path) -> None:
    """Add the file's LoRA as the transformer's adapter, in float32. Raises ValueError where it does not fit."""
    check(given, transformer, path)
    ranks = {name: value.shape[0] for name, value in given.a.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(given.alpha.values()))
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft takes any number
        target_modules=_targets(given),
        rank_pattern={f"^{re.escape(name)}": value for name, value in ranks.items() if value != rank},
        alpha_pattern={f"^{re.escape(name)}": value for name, value in given.alpha.items() if value != alpha},
    )
    network: Any = transformer
    network.add_adapter(config, adapter_name=lora.ADAPTER)
    for parameter in lora.parameters(transformer).values():
        parameter.data = parameter.data.float()
    matrices = {f"{name}.lora_A.{lora.ADAPTER}.weight": value for name, value in given.a.items()}
    matrices |= {f"{name}.lora_B.{lora.ADAPTER}.weight": value for name, value in given.b.items()}
    lora.load(transformer, matrices)


def _targets(given: LoRAFile) -> list[str] | str:
    """The layers as peft takes them: as endings of names, or, where one is no part of a block, as whole names.

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
    tensors = {f"{prefix}{name}.lora_A.weight": value.contiguous() for name, value in given.a.items()}
    tensors |= {f"{prefix}{name}.lora_B.weight": value.contiguous() for name, value in given.b.items()}
    metadata = {"format": "pt"}
    if form == "comfy":
        tensors |= {f"{prefix}{name}.alpha": torch.tensor(alpha) for name, alpha in given.alpha.items()}
    else:
        config = _config(given)
        if form == "peft":
            (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        else:
            metadata[METADATA] = json.dumps({f"{prefix}{key}": value for key, value in config.items()}, sort_keys=True)
    save_file(tensors, folder / NAMES[form], metadata=metadata)
    return folder / NAMES[form]


def _config(given: LoRAFile) -> dict[str, Any]:
    """peft's configuration of the adapter as plain data."""
    ranks = {value.shape[0] for value in given.a.values()}
    alphas = set(given.alpha.values())
    if len(ranks) > 1 or len(alphas) > 1:
        raise UserError("layers of several ranks or alphas have no common configuration; choose --format=comfy")
    config = LoraConfig(r=ranks.pop(), lora_alpha=alphas.pop(), target_modules=_targets(given))  # type: ignore[arg-type]
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    return {key: value for key, value in plain.items() if isinstance(value, (str, int, float, bool, list, dict))}
