"""Checkpoints: trained weights, their average, optimizer and counters as safetensors and JSON;
written whole or not at all.
"""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from flowrl.errors import UserError
from flowrl.parallel.sharding import part_of
from flowrl.runs import disk
from flowrl.runs.files import file_digest, grant_usual_mode, set_aside

log = logging.getLogger(__name__)

STATE = "state.json"
SUMS = "SHA256SUMS"
"""The digests of a checkpoint's files: `sha256sum -c SHA256SUMS` in its folder checks them."""

Weights = dict[str, dict[str, Tensor]]
"""Tensors by name, of each file by its stem."""

_LEFTOVERS = (".partial", ".deleted")
"""The endings of what a kill leaves behind: a checkpoint half-written or just written, and one
half-deleted or about to be.
"""

_NO_SYNC_OF_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
"""What a file system answers that cannot wait for a folder."""

_Read = TypeVar("_Read")


def save(
    folder: Path,
    *,
    keep: int,
    weights: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
) -> Path:
    """Write `folder/<iteration>` through a temporary folder and a rename, then delete all but the
    newest `keep`.

    `weights` maps file stems to tensors; `state` must hold `num_iterations`. After a crash or a
    kill at any moment, every folder with a number for a name is complete, and `load_newest` finds
    the newest whole checkpoint. What such moments left behind earlier is removed, and so is what
    this call wrote where it fails, as on a full disk.
    """
    target = folder / f"{state['num_iterations']:06d}"
    partial = folder / f"{target.name}.partial"
    # First, since the leftovers of a kill may fill the disk, or have the name that is needed.
    _recover_last_whole(folder)
    partial.mkdir(parents=True)
    try:
        _write(partial, weights, state)
    except Exception as error:
        # What was written gives its space back before the free space is told.
        shutil.rmtree(partial, ignore_errors=True)
        if disk.is_full(error):
            num_bytes = sum(map(_num_bytes, weights.values()))
            size = disk.in_words(num_bytes)
            raise disk.DiskFull(
                f"{target}: a checkpoint takes {size}, and {disk.free(folder)} are free"
            ) from error
        raise
    # The old one of this iteration goes only once the new one stands.
    replaced = _set_for_deletion(target) if target.exists() else None
    partial.rename(target)
    # What stands in its place is deleted only once a power cut could not take back the rename.
    _wait_for_disk(folder)
    if replaced is not None:
        shutil.rmtree(replaced)
    # Older ones go last, so that there is never a moment without a whole checkpoint.
    for old in list_with_state(folder)[:-keep]:
        shutil.rmtree(_set_for_deletion(old))
    return target


def _write(
    folder: Path, weights: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> None:
    """Write a checkpoint's files, their digests last, and wait until the disk has them."""
    for stem, tensors in weights.items():
        contents = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(contents, folder / f"{stem}.safetensors")
    grant_usual_mode(folder)
    text = json.dumps(dict(state), indent=2)
    (folder / STATE).write_text(f"{text}\n")
    sums = [f"{file_digest(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / SUMS).write_text("".join(sums))
    # Without this a power cut may keep the rename that follows, and lose the files or what they
    # hold.
    for path in (*folder.iterdir(), folder):
        _wait_for_disk(path)


def _wait_for_disk(path: Path) -> None:
    """Wait until the disk has a file's content, or the names of what is in a folder, where the
    file system can wait for a folder.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems promise nothing of a folder, and say so.
        if not (path.is_dir() and error.errno in _NO_SYNC_OF_FOLDERS):
            raise
    finally:
        os.close(descriptor)


def _num_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Count the bytes of the tensors' values."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def remove_leftovers(folder: Path) -> Path | None:
    """Remove what kills have left behind: half-written checkpoints and half-deleted ones.

    Where no numbered folder is whole, the leftover that `load_newest` takes in its place stays, and
    is returned.
    """
    leftovers = _leftovers(folder)
    last_whole = None
    # Newest first, since checking a checkpoint reads all of it, and the newest is most likely
    # whole.
    if leftovers and not any(map(_is_whole, reversed(_numbered(folder)))):
        last_whole = next(filter(_is_whole, _candidate_leftovers(folder)), None)
    for path in leftovers:
        if path != last_whole:
            shutil.rmtree(path, ignore_errors=True)
    return last_whole


def _recover_last_whole(folder: Path) -> None:
    """Remove what kills have left behind, and give the only whole checkpoint its number back where
    it is among it.
    """
    last_whole = remove_leftovers(folder)
    if last_whole is None:
        return
    target = last_whole.with_suffix("")
    # It is damaged: next to a whole one `remove_leftovers` would have removed the leftover.
    if target.exists():
        set_aside(target, "damaged")
    last_whole.rename(target)


def _leftovers(folder: Path) -> list[Path]:
    """List what kills have left behind, whole or not."""
    return [path for path in folder.glob("*") if path.suffix in _LEFTOVERS]


def _candidate_leftovers(folder: Path) -> list[Path]:
    """List leftovers that may be whole, as far as their names and the list of their files say,
    newest first.

    The digests are written last, so that without them a leftover is not known to be whole.
    """
    candidates = []
    for path in _leftovers(folder):
        if path.stem.isdigit() and (path / SUMS).is_file():
            candidates.append(path)
    # Of one iteration `.partial`, which was written later, comes before `.deleted`.
    return sorted(candidates, key=lambda path: (int(path.stem), path.suffix), reverse=True)


def _is_whole(path: Path) -> bool:
    """Tell whether `check` takes a checkpoint."""
    try:
        check(path)
    except UserError:
        return False
    return True


def _set_for_deletion(path: Path) -> Path:
    """Rename a checkpoint so that a kill half-way through its deletion leaves no numbered folder
    behind.
    """
    doomed = path.with_suffix(".deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    return path.rename(doomed)


def list_with_state(folder: Path) -> list[Path]:
    """List checkpoints that were written to their end, oldest first, not checked for damage."""
    return [path for path in _numbered(folder) if (path / STATE).is_file()]


def _numbered(folder: Path) -> list[Path]:
    folders = [path for path in folder.glob("*") if path.name.isdigit() and path.is_dir()]
    # By number, since a number of seven digits sorts before one of six as a text.
    return sorted(folders, key=lambda path: int(path.name))


def load_newest(
    folder: Path, stems: Iterable[str], keys: Mapping[str, type] | None = None
) -> tuple[Path, Weights, dict[str, Any]] | None:
    """Read the newest whole checkpoint; None where there is no checkpoint at all. `stems` and
    `keys` are those of `check`.

    Damaged ones are passed over with a warning. Raises UserError, naming the newest file, where all
    are damaged.
    """
    newest_whole = _first_readable(folder, lambda path: load(path, stems, keys))
    return None if newest_whole is None else (newest_whole[0], *newest_whole[1])


def find_newest(folder: Path, stems: Iterable[str]) -> Path | None:
    """Find the folder of the newest whole checkpoint, as `load_newest` takes it, with no weights
    read into memory.
    """
    newest_whole = _first_readable(folder, lambda path: check(path, stems))
    return None if newest_whole is None else newest_whole[0]


def _first_readable(folder: Path, read: Callable[[Path], _Read]) -> tuple[Path, _Read] | None:
    """Return the newest checkpoint that `read` does not refuse, with what it gives; a leftover of a
    kill where no other is whole.
    """
    damages: list[UserError] = []
    numbered = list(reversed(_numbered(folder)))
    for path in (*numbered, *_candidate_leftovers(folder)):
        try:
            content = read(path)
        except UserError as error:
            # A damaged leftover is no loss to the user, who never saw it.
            if path in numbered:
                damages.append(error)
            continue
        for damage in damages:
            _warn_once(f"{damage}; going on from {path}, the newest whole one")
        return path, content
    if damages:
        others = f", as are the {len(damages) - 1} before it" if len(damages) > 1 else ""
        raise UserError(
            f"{damages[0]}{others}; restore one from a copy, or delete {folder} to begin again"
        )
    return None


@functools.cache
def _warn_once(text: str) -> None:
    """Log a warning that several readers of one folder would give."""
    log.warning("%s", text)


def set_aside_after(path: Path) -> None:
    """Rename damaged checkpoints that are newer than the whole one at `path`, so that none counts
    as one to keep.
    """
    for later in _numbered(path.parent):
        if later != path and int(later.name) >= int(path.stem):
            set_aside(later, "damaged")


def load(
    path: Path, stems: Iterable[str] = (), keys: Mapping[str, type] | None = None
) -> tuple[Weights, dict[str, Any]]:
    """Read a checkpoint back. Raises UserError, naming the file, for one that `check` refuses."""
    state = check(path, stems, keys)
    weights = {}
    for file in sorted(path.glob("*.safetensors")):
        try:
            weights[file.stem] = load_file(file)
        except (SafetensorError, OSError) as error:
            raise _damaged(file, error) from error
    return weights, state


def check(
    path: Path, stems: Iterable[str] = (), keys: Mapping[str, type] | None = None
) -> dict[str, Any]:
    """Return the state of a checkpoint, all of whose files are whole.

    `stems` are the weights that it must hold, `keys` those of its state, with their types. Its
    files are compared with their digests, which checkpoints of earlier versions do not have. Raises
    UserError, naming the file, for a missing or a damaged one.
    """
    for stem in stems:
        if not (path / f"{stem}.safetensors").is_file():
            raise _damaged(path, f"{stem}.safetensors is missing")
    _check_sums(path)
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise _damaged(file, error) from error
    return _read_state(path, keys or {})


def _read_state(path: Path, keys: Mapping[str, type]) -> dict[str, Any]:
    """Read a checkpoint's state, which must be of the iteration that its folder names and hold
    `keys`.
    """
    file = path / STATE
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(file, error) from error
    if not isinstance(state, dict) or state.get("num_iterations") != int(path.stem):
        raise _damaged(file, f"it does not hold num_iterations={int(path.stem)}")
    for key, kind in keys.items():
        if key not in state:
            raise _damaged(file, f"it does not hold {key}")
        if not isinstance(state[key], kind):
            raise _damaged(file, f"{key} is a {type(state[key]).__name__}")
    return state


def _damaged(path: Path, problem: object) -> UserError:
    """Return the error for a damaged checkpoint, to which the reader adds what is done about it."""
    return UserError(f"checkpoint {path} is damaged ({problem})")


def _check_sums(path: Path) -> None:
    """Compare a checkpoint's files with their digests, written as sha256sum writes and checks
    them.
    """
    sums = path / SUMS
    if not sums.is_file():
        return
    digests: dict[str, str] = {}
    for line in sums.read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        digests[name] = digest
    # File managers and network drives leave hidden files of theirs.
    visible = {file.name for file in path.iterdir() if not file.name.startswith(".")}
    unmatched = sorted((visible - {SUMS}) ^ digests.keys())
    if unmatched:
        name = unmatched[0]
        problem = f"{name} is missing" if name in digests else f"{SUMS} lacks {name}"
        raise _damaged(path, problem)
    for name, digest in digests.items():
        if file_digest(path / name) != digest:
            raise _damaged(path / name, f"it differs from its digest in {SUMS}")


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's per-parameter state as tensors, each by the number of its parameter
    and its name, such as `3.exp_avg`.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for index, parameter in enumerate(_parameters_of(optimizer)):
        # Not by `state_dict`, where bitsandbytes nests what FSDP should pass over.
        for name, value in optimizer.state.get(parameter, {}).items():
            # A count of steps may be a plain number, which safetensors does not hold.
            tensor = torch.as_tensor(value)
            # All of bitsandbytes' states hold the same tables, which it would not write twice.
            tensors[f"{index}.{name}"] = tensor.clone() if id(tensor) in seen else tensor
            seen.add(id(tensor))
    return tensors


def load_optimizer_tensors(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Take back what `optimizer_tensors` gave, divided as the parameters are; the optimizer keeps
    its hyperparameters.
    """
    parameters = _parameters_of(optimizer)
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        index = int(number)
        # A whole number was a plain one; PyTorch's own counts of steps are of float32.
        is_count = not value.ndim and not value.is_floating_point()
        content = value.item() if is_count else part_of(value, parameters[index])
        state.setdefault(index, {})[name] = content
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """List the parameters of all groups in order, by which states are numbered."""
    parameters: list[Tensor] = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    return parameters
