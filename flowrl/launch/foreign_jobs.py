"""The check of what the folder of a sweep may start: its record, and the configurations and
overrides of its jobs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from flowrl.errors import UserError
from flowrl.launch.composed import DAMAGED, HEAD
from flowrl.launch.foreign_targets import (
    CODE,
    FILES,
    KEY,
    KNOWN,
    RESOLVERS,
    Node,
    Project,
    check_config,
    code_fault,
    is_name,
    leak_fault,
    nodes_of,
    parse,
    project_of,
    resolvers_of,
)
from flowrl.launch.saved import read_saved
from flowrl.launch.search_path import project_folders, search_flags
from flowrl.runs.command_line import escape, resume_command
from flowrl.runs.files import SOURCE, read_text
from flowrl.runs.installation import COMMAND, CONF, TRAIN
from flowrl.sweep.job import COMPOSED
from flowrl.sweep.plan import Sweep

NO_VALUE = "holds more than a value or an option"


def continue_command(
    folder: Path, jobs: Iterable[Path], hydra: Any, *, is_sweep: bool = False
) -> str:
    """Return the command that continues the run or the sweep in `folder`, which the runs in the
    folders `jobs` make up.

    It trusts the folder where what the user has composed would otherwise be refused, such as a
    scorer elsewhere.
    """
    command = resume_command(folder, is_sweep=is_sweep, flags=search_flags(hydra))
    conf = project_folders(hydra, leaving_out=folder)
    try:
        for job in jobs:
            check_job(job, conf)
    except UserError:
        return f"{command} ++{KEY}=true"
    return command


def check_job(folder: Path, conf: Iterable[Path], typed: Sequence[str] = ()) -> None:
    """Check what a job of a sweep would start or continue from, and Hydra's part of it, as
    `check_config` does.

    The job keeps what its file says, so an override that the user `typed` vouches for the same
    value alone.
    """
    values = {item.key_or_group: item.value() for item in parse(typed) if not item.is_delete()}
    # A job that has not begun starts from the first, one that has continues from the second.
    for name, remedy in ((COMPOSED, DAMAGED), (SOURCE, "restore it")):
        if not (folder / name).is_file():
            continue
        cfg = read_saved(folder / name, remedy)
        same = {key for key, value in values.items() if _raw(cfg, key) == value}
        check_config(cfg, folder, is_trusted=False, conf=conf, typed=same)
        if name == COMPOSED:
            _check_composed(cfg, folder)


def _raw(cfg: DictConfig, key: str) -> Any:
    """Return the value at a dotted key as it is written; None where there is none."""
    node = OmegaConf.to_container(cfg, resolve=False)
    for name in key.split("."):
        node = node.get(name) if isinstance(node, dict) else None
    return node


def _check_composed(cfg: DictConfig, folder: Path) -> None:
    """Check that Hydra composes a job's file from nothing beside it, and does nothing but what
    FlowRL writes there.
    """
    path = folder / COMPOSED
    raw: Any = OmegaConf.to_container(cfg, resolve=False)
    if culprit := _not_ours(raw, path):
        raise UserError(f"{path}: {culprit} is not as FlowRL writes it; {CODE}; {KNOWN}")
    place = raw["hydra"].get("run", {}).get("dir")
    # Compared as it is written in the file, where `${` of a folder's name is escaped.
    expected = Path(escape(str(folder))).resolve()
    if not isinstance(place, str) or Path(place).resolve() != expected:
        raise UserError(
            f"{path}: hydra.run.dir={place} is not its folder; {FILES}; move it back, or {KNOWN}"
        )


def _not_ours(raw: dict[str, Any], path: Path) -> str:
    """Name what FlowRL does not write into a job's file or beside it; an empty text where there is
    no such thing.
    """
    # The first lines may say into which package the file goes, and a folder `hydra` beside it comes
    # before Hydra's own.
    has_head = read_text(path, DAMAGED).startswith(HEAD)
    if not has_head or raw.get("defaults") != yaml.safe_load(HEAD)["defaults"]:
        return "defaults"
    if (path.parent / "hydra").exists():
        return "the folder hydra beside it"
    for key, value in _settings(raw.get("hydra")):
        if key not in _HARMLESS or not _HARMLESS[key](value):
            return f"hydra.{key}={value}"
    return ""


def _settings(hydra: Any) -> Iterator[tuple[str, Any]]:
    """Walk Hydra's settings of a job, those of its groups of settings by their dotted keys."""
    if not isinstance(hydra, dict):
        yield "", hydra
        return
    for name, value in hydra.items():
        if name in ("job", "run", "runtime") and isinstance(value, dict):
            for key, child in value.items():
                yield f"{name}.{key}", child
        else:
            yield str(name), value


def _is_label(value: object) -> bool:
    """Tell whether a value is nothing, or a name that leads to no other folder."""
    if value is None:
        return True
    return isinstance(value, str | int) and is_name(str(value))


_HARMLESS: dict[str, Callable[[Any], bool]] = {
    # What the two loggings hold is checked by `check_config`.
    "job_logging": lambda value: value is None or isinstance(value, dict),
    "hydra_logging": lambda value: value is None or isinstance(value, dict),
    "output_subdir": _is_label,
    "callbacks": lambda value: not value,
    "verbose": lambda value: not isinstance(value, dict),
    "job.name": lambda value: _is_label(value) and "/" not in str(value),
    "job.chdir": lambda value: value in (None, False),
    "job.num": lambda value: isinstance(value, int),
    "job.id": _is_label,
    "job.env_set": lambda value: not value,
    "job.env_copy": lambda value: not value,
    "run.dir": lambda value: isinstance(value, str),
    "runtime.choices": lambda value: isinstance(value, dict),
}
"""Hydra's settings that FlowRL writes to a job's file, and which of their values do nothing by
themselves.
"""


def check_sweep(folder: Path, sweep: Sweep, running: Path, conf: Iterable[Path] = (CONF,)) -> None:
    """Check that a sweep's folder names the script that is `running`, or train.py, and harmless
    overrides alone.

    Its jobs start in the directory that it names, as one's own sweep that is continued from
    elsewhere must. Python and libraries look for code and settings there: it must lie outside of
    the sweep's folder and hold none of these. Jobs of the command `flowrl` look for any module
    there, so that it must be the working directory.
    """
    if sweep.script not in (TRAIN, COMMAND, running):
        raise UserError(
            f"{folder}: its jobs run {sweep.script}, not {running}; continue it with that script, "
            f"or {KNOWN}"
        )
    if sweep.directory.resolve() != Path.cwd():
        _check_directory(folder, sweep.directory, is_on_path=sweep.script == COMMAND)
    for overrides in sweep.jobs:
        check_overrides(overrides, folder, conf)


def _check_directory(folder: Path, directory: Path, *, is_on_path: bool) -> None:
    """Refuse a working directory in which something is looked for that could run code."""
    problem = ""
    if not directory.is_absolute() or directory.resolve().is_relative_to(folder.resolve()):
        problem = "which comes with it"
    elif (directory / "wandb" / "settings").exists():
        problem = "whose wandb/settings would apply"
    elif name := _relative_search_path():
        problem = f"in which {name} looks for code"
    elif is_on_path:
        problem = "in which Python looks for code"
    if problem:
        raise UserError(
            f"{folder}: its jobs run in {directory}, {problem}; continue it from there, or {KNOWN}"
        )


def _relative_search_path() -> str:
    """Return the first variable of the environment that has code looked for in the working
    directory; an empty text where none does.
    """
    for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH"):
        value = os.environ.get(name)
        # An empty entry means the working directory too, and is not absolute.
        if value and not all(map(os.path.isabs, value.split(os.pathsep))):
            return name
    return ""


def check_overrides(overrides: Iterable[str], folder: Path, conf: Iterable[Path] = (CONF,)) -> None:
    """Check that overrides, read from a sweep's `folder`, are values and options of the project and
    run no code.

    Raises UserError for command-line flags, Hydra's settings, targets, resolvers, options outside
    of conf/, and for what `check_config` refuses.
    """
    project = project_of(conf)
    for text in overrides:
        if fault := _fault(text, project, folder):
            raise UserError(
                f"{folder}: its job's {text} {fault}, which can run code of whoever made the "
                f"folder or send your files away; {KNOWN}"
            )


def _fault(text: str, project: Project, folder: Path) -> str:
    """Say what is wrong with an override; an empty text where nothing is."""
    try:
        (override,) = parse([text])
    except HydraException:
        return NO_VALUE
    if override.is_sweep_override() or "_target_" in text:
        return NO_VALUE
    key = str(override.key_or_group)
    package = re.split(r"[./]", override.package or "")
    if re.split(r"[./]", key)[0] in ("hydra", KEY) or "hydra" in package:
        return "sets what Hydra or this check does"
    if override.is_delete():
        return ""
    faults = (_node_fault(node, key, project, folder) for node in nodes_of(override.value(), key))
    return next(filter(None, faults), "")


def _node_fault(node: Node, key: str, project: Project, folder: Path) -> str:
    """Say what is wrong with a value that the override of `key` sets; an empty text where nothing
    is.
    """
    text = node.value if isinstance(node.value, str) else ""
    # A key without a dot may choose an option, whose file may lie anywhere.
    if "." not in key and (text.startswith("/") or ".." in text):
        return "takes an option from elsewhere"
    if resolvers_of(text) - RESOLVERS:
        return "calls a resolver"
    fault = code_fault(node, project) or leak_fault(node, project, folder)
    return fault.partition(":")[0]
