"""The check of what a configuration that lies in a run's folder may build: the folder may be
somebody else's.

Instantiating a configuration calls what its `_target_`s name, with arguments of its own:
`torch.load` of a file beside it, say, runs code. Such a configuration is therefore read before
anything of it is resolved or instantiated.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from flowrl.errors import UserError
from flowrl.runs.files import LOADER
from flowrl.runs.installation import CONF

KEY = "trust_folder"
"""The configuration key that turns the check off."""


LIGHTNING = {
    "lightning.Trainer",
    "lightning.pytorch.Trainer",
    "lightning.pytorch.callbacks.DeviceStatsMonitor",
    "lightning.pytorch.callbacks.LearningRateMonitor",
    "lightning.pytorch.callbacks.RichProgressBar",
    "lightning.pytorch.callbacks.TQDMProgressBar",
    "lightning.pytorch.callbacks.Timer",
}
"""Classes of Lightning that need not be named by the project; others write where they are told, or
start commands.
"""

OPEN = (
    "losses",
    "samplers",
    "rewards",
    "callbacks.progress",
    "training.best_worst",
    "training.learning_rate",
    "schedule",
    "prompts",
)

"""Modules of FlowRL whose classes need not be named by the project: none of them writes, deletes or
starts anything.
"""

RESOLVERS = {"image_tokens"}
"""Resolvers that a saved configuration may call; `oc.env` reads secrets, `oc.create` makes targets
out of text.
"""

SETTINGS: dict[str, tuple[object, ...]] = {
    "trust_remote_code": (False, None),
    "allow_pickle": (False, None),
    "weights_only": (True,),
}
"""Settings under which loaders run code, whoever names the loader, and the values under which they
do not.
"""


LOGGING = ("hydra.job_logging.", "hydra.hydra_logging.")
"""Hydra's own settings of logging, whose handlers and formatters are built by class name."""

LOGGING_CLASSES = (
    "logging.StreamHandler",
    "logging.FileHandler",
    "logging.NullHandler",
    "logging.Formatter",
)
LOG_FILE = "${hydra.runtime.output_dir}/${hydra.job.name}.log"

PLACES = ("save_dir", "folder", "dirpath", "default_root_dir", "weights_save_path")
"""Last words of keys under which something is written."""

REFUSED = ("_args_", "model_registry")
"""Keys that hide what their values are for, or that upload."""

LOOPBACK = re.compile(r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?(/[\w./-]*)?")

KNOWN = f"use it with {KEY}=true if you know it"
CODE = "that can run code of whoever made the folder"
AWAY = "that can send your files and secrets away"
FILES = "that can overwrite your files"


@dataclass(frozen=True)
class Node:
    """A value, a mapping or a list of a configuration: its place, its own name there, and the
    target it is handed to.

    An entry of a list has no name.
    """

    key: str
    name: str
    value: Any
    target: Any = None


@dataclass(frozen=True)
class Project:
    """The contents of the project's YAML files: targets, all values, and values with the last words
    of their keys.
    """

    targets: set[Any]
    values: set[Any]
    named: set[tuple[str, Any]]

    def has(self, node: Node) -> bool:
        """Tell whether the same value stands under a key of the same name."""
        return isinstance(node.value, Hashable) and (node.name, node.value) in self.named


def check_config(
    cfg: DictConfig,
    folder: Path,
    *,
    is_trusted: bool,
    conf: Iterable[Path] = (CONF,),
    typed: Collection[str] = (),
) -> DictConfig:
    """Return the configuration `cfg`, which was read from `folder`, as it is.

    Raises UserError unless its targets are named by the YAML files in `conf` too, or are classes of
    `OPEN` modules, `torch.optim` or `LIGHTNING`; and for addresses of other machines, tokens, and
    places outside of the folder that are neither named there nor by the keys that were `typed` on
    this command line. With `is_trusted` everything passes. Nothing is imported but modules of these
    packages.
    """
    if is_trusted:
        return cfg
    project = project_of(conf)
    # Unresolved: a resolver would be called by the very check that is to refuse it.
    for node in nodes_of(OmegaConf.to_container(cfg, resolve=False)):
        fault = code_fault(node, project)
        # What the user typed may go where it says, but runs no code for that.
        if not fault and node.key not in typed:
            fault = leak_fault(node, project, folder)
        if fault:
            raise UserError(f"{folder}: its configuration {fault}")
    return cfg


def code_fault(node: Node, project: Project) -> str:
    """Say why a node could run code, and the remedy; an empty text where it cannot."""
    key = node.key
    name = node.name
    value = node.value
    problem = ""
    remedy = KNOWN
    if name == "_target_" and not _is_known_target(value, project):
        problem = "names what this project does not"
        remedy = f"{KNOWN}, or give the folder of your own that names it: --config-dir DIR"
    elif name in REFUSED:
        problem = f"holds {name}"
    elif key.startswith(LOGGING) and not _is_plain_logging(name, value):
        problem = "lets logging call code or write elsewhere"
    elif name in SETTINGS and not _is_harmless_setting(name, value):
        problem = "lets a loader run code"
    elif resolvers := _foreign_resolvers(value, project):
        problem = f"calls the resolver {', '.join(sorted(resolvers))}"
    return problem and f"{problem}: {key}={value}; {CODE}; {remedy}"


def _is_known_target(value: object, project: Project) -> bool:
    return isinstance(value, str) and (value in project.targets or _is_harmless(value))


def _is_harmless_setting(name: str, value: object) -> bool:
    return not isinstance(value, dict | list) and value in SETTINGS[name]


def _foreign_resolvers(value: object, project: Project) -> set[str]:
    """Return the resolvers that a value calls, where the project holds no such value itself."""
    if not isinstance(value, str) or value in project.values:
        return set()
    return resolvers_of(value) - RESOLVERS


def leak_fault(node: Node, project: Project, folder: Path) -> str:
    """Say why a node could send something away, or write elsewhere, and the remedy; an empty text
    where it cannot.
    """
    if node.value in (None, "???") or node.key.startswith(LOGGING) or project.has(node):
        return ""
    problem = ""
    danger = AWAY
    if node.name == "token_env":
        problem = "names a secret of yours"
    elif _is_address(node):
        problem = "" if LOOPBACK.fullmatch(str(node.value)) else "names another machine"
    elif _is_place_elsewhere(node, folder):
        problem = "writes outside of its folder"
        danger = FILES
    repeat = f"repeat it on the command line ({node.key}=VALUE) if you mean it, or {KNOWN}"
    return problem and f"{problem}: {node.key}={node.value}; {danger}; {repeat}"


def _is_address(node: Node) -> bool:
    return node.name == "url" or (isinstance(node.value, str) and "://" in node.value)


def _is_place_elsewhere(node: Node, folder: Path) -> bool:
    """Tell whether a node has something written outside of the run's folder.

    A logger may put any text that it is given into the name of a file.
    """
    if node.name in PLACES:
        return not is_within(node.value, folder)
    is_logger = isinstance(node.target, str) and node.target.startswith("lightning.pytorch.loggers")
    is_handed_over = node.name != "_target_" and isinstance(node.value, str)
    return is_logger and is_handed_over and not is_name(node.value)


def is_within(value: object, folder: Path) -> bool:
    """Tell whether a place is the run's folder or below it, by `${run_dir}` or by its path."""
    if not isinstance(value, str):
        return False
    place = re.fullmatch(r"\$\{run_dir\}(/[\w./-]*)?", value)
    if place is not None:
        return ".." not in value
    # Another interpolation may lead anywhere, and a relative path depends on where it is started.
    is_plain = "${" not in value and "://" not in value and Path(value).is_absolute()
    return is_plain and Path(value).resolve().is_relative_to(folder.resolve())


def is_name(text: str) -> bool:
    """Tell whether a text, put after a folder and a slash, stays in that folder."""
    return not text.startswith(("/", "~")) and not any(mark in text for mark in ("..", "${", "\\"))


def parse(overrides: Sequence[str]) -> list[Override]:
    """Read overrides as Hydra does."""
    return OverridesParser.create().parse_overrides(list(overrides))


def is_trusting(overrides: Sequence[str]) -> bool:
    """Tell whether overrides that the user typed say `trust_folder=true`, in any of Hydra's
    spellings.
    """
    return any(
        item.key_or_group == KEY and not item.is_delete() and item.value() is True
        for item in parse(overrides)
    )


def nodes_of(node: Any, key: str = "", target: Any = None) -> Iterator[Node]:
    """Walk all values, mappings and lists from `node` on."""
    name = "" if key.endswith("]") else key.rpartition(".")[2]
    yield Node(key, name, node, target)
    if isinstance(node, dict):
        prefix = f"{key}." if key else ""
        for name, child in node.items():
            yield from nodes_of(child, f"{prefix}{name}", node.get("_target_"))
    elif isinstance(node, list):
        for number, child in enumerate(node):
            yield from nodes_of(child, f"{key}[{number}]")


def project_of(conf: Iterable[Path]) -> Project:
    """Read what the YAML files of these folders hold; Hydra's own group does not count."""
    project = Project(set(), set(), set())
    for folder in conf:
        for path in sorted(folder.rglob("*.yaml")):
            if path.relative_to(folder).parts[0] == "hydra":
                continue
            content = yaml.load(path.read_text(encoding="utf-8"), LOADER)
            for node in nodes_of(content):
                # Mappings and lists are walked themselves; only what they end in is compared.
                if not isinstance(node.value, Hashable):
                    continue
                project.values.add(node.value)
                project.named.add((node.name, node.value))
                if node.name == "_target_":
                    project.targets.add(node.value)
    return project


def _is_harmless(target: str) -> bool:
    """Tell whether a target is of `LIGHTNING`, an optimizer, or a class of an `OPEN` module, where
    it is defined.
    """
    if target in LIGHTNING:
        return True
    # Names that begin with an underscore are nobody's interface, and lead to Python's internals.
    if not re.fullmatch(r"[A-Za-z]\w*(\.[A-Za-z]\w*)+", target):
        return False
    package = target.rpartition(".")[0]
    if _is_below(package, *(f"flowrl.{module}" for module in OPEN)):
        target_class = _class(target)
        return target_class is not None and target_class.__module__ == package
    if not _is_below(package, "torch.optim"):
        return False
    target_class = _class(target)
    optimizer = _class("torch.optim.Optimizer")
    if target_class is None or optimizer is None:
        return False
    # A module may also hold what it imports from elsewhere.
    return issubclass(target_class, optimizer) and _is_below(target_class.__module__, "torch.optim")


def _is_plain_logging(name: str, value: object) -> bool:
    """Tell whether a setting of logging builds nothing but Python's own handlers, and imports no
    object by name.
    """
    if name == "()":
        return False
    if name == "class":
        return value in LOGGING_CLASSES
    if name == "filename":
        return value == LOG_FILE
    return (
        not isinstance(value, str)
        or "://" not in value
        or value in ("ext://sys.stdout", "ext://sys.stderr")
    )


def _is_below(module: str, *packages: str) -> bool:
    """Tell whether a module is one of these packages or stands in one."""
    # With a dot behind both, so that `torch.optimizers` is not below `torch.optim`.
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


def _class(target: str) -> type | None:
    """Import the class MODULE.NAME; None for anything else, such as a function, or a place below
    what is no module.
    """
    package, _, name = target.rpartition(".")
    try:
        member = getattr(import_module(package), name, None)
    except ImportError:
        return None
    return member if inspect.isclass(member) else None


def resolvers_of(text: str) -> set[str]:
    """Return the resolvers that a text calls; a name that is itself computed counts as it is
    written.
    """
    resolvers = set()
    for opening in re.finditer(r"\$\{", text):
        # A reference, as in ${trust.clip}, ends in a brace, and calls nothing.
        name = re.match(r"[^:{}]*(\$\{|[:}]|$)", text[opening.end() :])
        if name is not None and name[1] in (":", "${"):
            resolvers.add(name[0].rstrip(":").strip())
    return resolvers
