"""Checkpoints: LoRA, EMA, optimizer and counters as safetensors and JSON; written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from flowrl.errors import UserError
from flowrl.sharding import part_of

STATE = "state.json"


def save(folder: Path, *, keep: int, weights: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
    """Write `folder/<iteration>` through a temporary folder and a rename, then delete all but the newest `keep`.

    `weights` maps file stems to tensors; `state` must hold `num_iterations`. After a crash or a kill at any moment,
    every folder with a number for a name is complete.
    """
    target = folder / f"{state['num_iterations']:06d}"
    partial = folder / f"{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for stem, tensors in weights.items():
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            partial / f"{stem}.safetensors",
        )
    (partial / STATE).write_text(json.dumps(dict(state), indent=2) + "\n")
    for path in partial.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _delete(target)
    partial.rename(target)
    for old in list_complete(folder)[:-keep]:
        _delete(old)
    return target


def _delete(path: Path) -> None:
    """Remove a checkpoint so that a kill half-way leaves no numbered folder behind."""
    if path.exists():
        doomed = path.with_suffix(".deleted")
        shutil.rmtree(doomed, ignore_errors=True)
        shutil.rmtree(path.rename(doomed))


def list_complete(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first; half-written ones are not among them."""
    return sorted(path for path in folder.glob("*") if path.name.isdigit() and (path / STATE).is_file())


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read a checkpoint back. Raises ValueError, naming the file, for damaged weights."""
    weights = {}
    for file in sorted(path.glob("*.safetensors")):
        try:
            weights[file.stem] = load_file(file)
        except SafetensorError as error:
            raise UserError(_damage(file, error)) from error
    try:
        return weights, json.loads((path / STATE).read_text())
    except json.JSONDecodeError as error:
        raise UserError(_damage(path / STATE, error)) from error


def _damage(file: Path, error: Exception) -> str:
    return f"checkpoint {file} is damaged ({error}); delete its folder to resume from the one before"


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's per-parameter state as named tensors."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value) for index, values in state.items() for name, value in values.items()
    }


def load_optimizer_tensors(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`, keeping the optimizer's own hyperparameters; divided as its parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = part_of(value, parameters[int(index)])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
