"""What a configuration that lies in a run's folder may build, since the folder may be somebody else's.

Instantiating a configuration calls what its `_target_`s name, with arguments of its own: `torch.load` of a file beside
it, say, runs code. Such a configuration is therefore read before anything of it is resolved or instantiated.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from flowrl.errors import UserError
from flowrl.launch.command_line import TRAIN
from flowrl.launch.compose import CONF
from flowrl.runs.files import SOURCE
from flowrl.sweep.job import COMPOSED

KEY = "trust_folder"
"""The configuration key that turns the check off."""

KINDS = (
    ("torch.optim", "torch.optim.Optimizer"),
    ("lightning", "lightning.Callback"),
    ("lightning", "lightning.Trainer"),
)
"""Packages whose classes need not be named by the project, and of which base class each must be."""

OPEN = ("losses", "samplers", "rewards", "callbacks.progress", "learning_rate", "schedule", "prompts")
"""Modules of FlowRL whose classes need not be named by the project: none of them writes, deletes or starts anything."""

RESOLVERS = {"image_tokens"}
"""Resolvers that a saved configuration may call; `oc.env` reads secrets, `oc.create` makes targets out of text."""

SETTINGS: dict[str, tuple[object, ...]] = {
    "trust_remote_code": (False, None),
    "allow_pickle": (False, None),
    "weights_only": (True,),
}
"""Settings under which loaders run code, whoever names the loader, and the values under which they do not."""


LOGGING = ("hydra.job_logging.", "hydra.hydra_logging.")
"""Hydra's own settings of logging, whose handlers and formatters are built by class name."""


def check_config(cfg: DictConfig, folder: Path, *, is_trusted: bool, conf: Iterable[Path] = (CONF,)) -> DictConfig:
    """The configuration `cfg` that was read from `folder`, as it is.

    Raises UserError unless its targets are named by the YAML files in `conf` too, or are classes of `OPEN` modules or
    `KINDS`; with `is_trusted` everything passes. Nothing is imported but modules of these packages.
    """
    if is_trusted:
        return cfg
    targets, texts = _named_by(conf)
    for key, value in _leaves(OmegaConf.to_container(cfg, resolve=False)):
        name = key.rpartition(".")[2]
        problem = None
        if name == "_target_" and value not in targets and not _is_harmless(value):
            problem = "names what this project does not"
        elif key.startswith(LOGGING) and not _is_plain_logging(name, value):
            problem = "lets logging call code"
        elif name in SETTINGS and value not in SETTINGS[name]:
            problem = "lets a loader run code"
        elif isinstance(value, str) and value not in texts and (resolvers := _resolvers(value) - RESOLVERS):
            problem = f"calls the resolver {', '.join(sorted(resolvers))}"
        if problem is not None:
            raise UserError(
                f"{folder}: its configuration {problem}: {key}={value}; that can run code of whoever made the folder. "
                f"Use it with {KEY}=true if you know it, or name the same in a YAML file below conf/"
            )
    return cfg


def project_folders(hydra: Any, leaving_out: Path) -> list[Path]:
    """List the folders that Hydra, given its own configuration, composes from; none that lies in `leaving_out`.

    A job starts from a configuration in its own folder, which must not vouch for itself.
    """
    sources = hydra.runtime.config_sources
    paths = [Path(source.path).resolve() for source in sources if source.schema == "file" and source.path]
    return [CONF, *(path for path in paths if not path.is_relative_to(leaving_out.resolve()))]


def check_job(folder: Path, conf: Iterable[Path]) -> None:
    """Check what a job of a sweep would start or continue from, and Hydra's part of it, as `check_config` does."""
    for name in (COMPOSED, SOURCE):
        if (folder / name).is_file():
            cfg = OmegaConf.load(folder / name)
            assert isinstance(cfg, DictConfig)
            check_config(cfg, folder, is_trusted=False, conf=conf)


def check_sweep(folder: Path, script: Path, running: Path, jobs: Iterable[Sequence[str]]) -> None:
    """Check that a sweep's folder names the script that is `running`, or train.py, and harmless overrides alone."""
    if script not in (TRAIN, running):
        raise UserError(
            f"{folder}: its jobs run {script}, not {running}; continue it with that script, or with {KEY}=true if you "
            "know it"
        )
    for overrides in jobs:
        check_overrides(overrides, folder)


def check_overrides(overrides: Iterable[str], folder: Path) -> None:
    """Overrides that were read from a sweep's `folder` are values and options of the project, nothing that runs code.

    Raises UserError for command-line flags, Hydra's settings, targets and resolvers.
    """
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        is_odd = override.startswith("-") or key.split(".")[0].split("@")[0] in ("hydra", KEY) or "hydra/" in key
        if is_odd or "_target_" in override or _resolvers(value) - RESOLVERS:
            raise UserError(
                f"{folder}: its job's {override} can run code of whoever made the folder; use it with {KEY}=true if "
                "you know it"
            )


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The values below `node` with their places."""
    if isinstance(node, dict):
        for name, child in node.items():
            yield from _leaves(child, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for number, child in enumerate(node):
            yield from _leaves(child, f"{key}[{number}]")
    else:
        yield key, node


def _named_by(conf: Iterable[Path]) -> tuple[set[Any], set[Any]]:
    """The targets, and all values, that YAML files of these folders hold; Hydra's own group does not count."""
    targets, values = set(), set()
    for folder in conf:
        paths = (path for path in sorted(folder.rglob("*.yaml")) if path.relative_to(folder).parts[0] != "hydra")
        for path in paths:
            for key, value in _leaves(yaml.safe_load(path.read_text(encoding="utf-8"))):
                values.add(value)
                if key.rpartition(".")[2] == "_target_":
                    targets.add(value)
    return targets, values


def _is_harmless(target: Any) -> bool:
    """Whether a target names a class of `KINDS` or an `OPEN` module, by the place where that class is defined."""
    if not isinstance(target, str) or not re.fullmatch(r"[A-Za-z]\w*(\.[A-Za-z]\w*)+", target):
        return False
    package = target.rpartition(".")[0]
    if _is_below(package, *(f"flowrl.{module}" for module in OPEN)):
        own = _class(target)
        return own is not None and own.__module__ == package
    for prefix, base in KINDS:
        own, kind = (_class(target), _class(base)) if _is_below(package, prefix) else (None, None)
        if own is not None and kind is not None and issubclass(own, kind) and _is_below(own.__module__, prefix):
            return True
    return False


def _is_plain_logging(name: str, value: object) -> bool:
    """Whether a setting of logging builds nothing but Python's own handlers, and imports no object by name."""
    if name == "()":
        return False
    if name == "class":
        return isinstance(value, str) and value.startswith("logging.")
    return not isinstance(value, str) or "://" not in value or value in ("ext://sys.stdout", "ext://sys.stderr")


def _is_below(module: str, *packages: str) -> bool:
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


def _class(target: str) -> type | None:
    """The class MODULE.NAME; None for anything else, such as a function, or a place below what is no module."""
    package, _, name = target.rpartition(".")
    try:
        found = getattr(import_module(package), name, None)
    except ImportError:
        return None
    return found if inspect.isclass(found) else None


def _resolvers(text: str) -> set[str]:
    """The resolvers that a text calls; a name that is itself computed counts as it is written."""
    found = set()
    for opening in re.finditer(r"\$\{", text):
        name = re.match(r"[^:{}]*(\$\{|[:}]|$)", text[opening.end() :])
        if name is not None and name[1] in (":", "${"):
            found.add(name[0].rstrip(":").strip())
    return found
