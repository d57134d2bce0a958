"""Checkpoints: LoRA, EMA, optimizer and counters as safetensors and JSON; written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from flowrl.errors import UserError
from flowrl.runs import disk
from flowrl.runs.files import set_aside
from flowrl.sharding import part_of

log = logging.getLogger(__name__)

STATE = "state.json"
SUMS = "SHA256SUMS"
"""The digests of a checkpoint's files: `sha256sum -c SHA256SUMS` in its folder checks them."""

Weights = dict[str, dict[str, Tensor]]
"""Tensors by name, of each file by its stem."""


def save(folder: Path, *, keep: int, weights: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
    """Write `folder/<iteration>` through a temporary folder and a rename, then delete all but the newest `keep`.

    `weights` maps file stems to tensors; `state` must hold `num_iterations`. After a crash or a kill at any moment,
    every folder with a number for a name is complete. What such moments left behind earlier is removed, and so is what
    this call wrote where it fails, as on a full disk.
    """
    target = folder / f"{state['num_iterations']:06d}"
    partial = folder / f"{target.name}.partial"
    sweep(folder)
    partial.mkdir(parents=True)
    try:
        for stem, tensors in weights.items():
            save_file(
                {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
                partial / f"{stem}.safetensors",
            )
        (partial / STATE).write_text(json.dumps(dict(state), indent=2) + "\n")
        (partial / SUMS).write_text("".join(f"{_digest(path)}  {path.name}\n" for path in sorted(partial.iterdir())))
        for path in partial.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if disk.is_full(error):
            size = sum(tensor.numel() * tensor.element_size() for each in weights.values() for tensor in each.values())
            raise disk.DiskFull(
                f"{target}: a checkpoint takes {disk.in_words(size)}, and {disk.free(folder)} are free"
            ) from error
        raise
    _delete(target)
    partial.rename(target)
    for old in list_complete(folder)[:-keep]:
        _delete(old)
    return target


def sweep(folder: Path) -> None:
    """Remove what kills have left behind: half-written checkpoints and half-deleted ones."""
    for path in (*folder.glob("*.partial"), *folder.glob("*.deleted")):
        shutil.rmtree(path, ignore_errors=True)


def _delete(path: Path) -> None:
    """Remove a checkpoint so that a kill half-way leaves no numbered folder behind."""
    if path.exists():
        doomed = path.with_suffix(".deleted")
        shutil.rmtree(doomed, ignore_errors=True)
        shutil.rmtree(path.rename(doomed))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_complete(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first; half-written ones are not among them."""
    return [path for path in _numbered(folder) if (path / STATE).is_file()]


def _numbered(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.name.isdigit() and path.is_dir())


def newest(folder: Path, stems: Iterable[str], keys: Iterable[str] = ()) -> tuple[Path, Weights, dict[str, Any]] | None:
    """The newest whole checkpoint, read; None where there is no checkpoint at all. `stems` and `keys` as in `load`.

    Damaged ones are passed over with a warning. Raises UserError, naming the newest file, where all are damaged.
    """
    damages: list[UserError] = []
    for path in reversed(_numbered(folder)):
        try:
            weights, state = load(path, stems, keys)
        except UserError as error:
            damages.append(error)
            continue
        for damage in damages:
            log.warning("%s; going on from %s, the newest whole one", damage, path)
        return path, weights, state
    if damages:
        others = f", as are the {len(damages) - 1} before it" if len(damages) > 1 else ""
        raise UserError(f"{damages[0]}{others}; restore one from a copy, or delete {folder} to begin again")
    return None


def set_aside_after(path: Path) -> None:
    """Rename damaged checkpoints that are newer than the whole one at `path`, so that none counts as one to keep."""
    for later in _numbered(path.parent):
        if later.name > path.name:
            set_aside(later, "damaged")


def load(path: Path, stems: Iterable[str] = (), keys: Iterable[str] = ()) -> tuple[Weights, dict[str, Any]]:
    """Read a checkpoint back. Raises UserError, naming the file, for a missing or a damaged one.

    `stems` are the weights that it must hold, `keys` those of its state. Its files are compared with their digests,
    which checkpoints of earlier versions do not have.
    """
    files = {file.stem: file for file in sorted(path.glob("*.safetensors"))}
    for stem in stems:
        if stem not in files:
            raise UserError(f"checkpoint {path} is damaged ({stem}.safetensors is missing)")
    _check_sums(path)
    weights = {}
    for stem, file in files.items():
        try:
            weights[stem] = load_file(file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"checkpoint {file} is damaged ({error})") from error
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"checkpoint {path / STATE} is damaged ({error})") from error
    if not isinstance(state, dict) or state.get("num_iterations") != int(path.name):
        raise UserError(f"checkpoint {path / STATE} is damaged (it does not hold num_iterations={int(path.name)})")
    if lacking := [key for key in keys if key not in state]:
        raise UserError(f"checkpoint {path / STATE} is damaged (it does not hold {lacking[0]})")
    return weights, state


def _check_sums(path: Path) -> None:
    """Compare a checkpoint's files with their digests, written as sha256sum writes and checks them."""
    sums = path / SUMS
    if not sums.is_file():
        return
    for line in sums.read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        if len(Path(name).parts) != 1 or not (path / name).is_file() or _digest(path / name) != digest:
            raise UserError(f"checkpoint {path / name} is damaged (it differs from its digest in {SUMS})")


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
