"""The check of types and bounds of every key of a composed configuration, before anything heavy
loads.

A key's type is in the signature of what its node's `_target_` names, or in `flowrl.launch.schema`;
pydantic compares, without conversions. Keys that need no target come first, so that most slips are
answered before PyTorch is imported. A value is named by the key where it was set: `loss.clip_low:
${trust.clip}` is told as trust.clip.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flowrl.errors import UserError
from flowrl.launch.errors import explain
from flowrl.launch.schema import Node, Settings
from flowrl.launch.signatures import (
    foreign_of,
    hints_of,
    import_target,
    parameters_of,
    require_all,
    require_key,
    require_kind,
)
from flowrl.runs.installation import CONF
from flowrl.values.bounds import Dotted
from flowrl.values.wording import describe, fits, meant, nearest, show, unwrap

REFERENCE = re.compile(r"\$\{([\w.\[\]]+)\}")
"""A key's value that is another's, such as ${trust.clip}; what a resolver computes is not."""

SPECIAL: dict[str, Any] = {
    "_target_": Dotted,
    "_partial_": bool,
    "_recursive_": bool,
    "_convert_": Literal["none", "partial", "object", "all"],
}
"""Hydra's words in a node with a target."""

Path = tuple[str | int, ...]

CALLED = ("optimizer", "advantage", "learning_rate", "embeddings")
"""Nodes that may name a function to be called later, with `_partial_: true`."""

WHOLE = {
    (key,) for key, hint in get_type_hints(Settings).items() if hint is Node and key not in CALLED
}
"""Nodes that are built as they stand."""


def validate(cfg: DictConfig, *, is_resumed: bool = False) -> None:
    """Raise UserError, in one line, for the first key whose value is not of its type or out of its
    bounds.

    A run of another version, which `is_resumed`, may lack keys that nothing reads, and have some
    that nothing knows.
    """
    raw = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(raw, dict)
    if raw.get("run_dir", "") is None:
        # It stands for the new folder, which is made later, and for all that take it from there.
        raw["run_dir"] = "outputs"
    _Walk(cfg, {str(key): value for key, value in raw.items()}, is_resumed).run()


def name_of(path: Path) -> str:
    """Write a path as the command line has it: lora.rank, optimizer.betas[0]."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}"
    return text.removeprefix(".")


class _Walk:
    """One pass over a configuration; `raw` is its plain form with interpolations as they are
    written.
    """

    def __init__(self, cfg: DictConfig, raw: dict[str, Any], is_resumed: bool) -> None:
        self.cfg = cfg
        self.raw = raw
        self.is_resumed = is_resumed
        self.references: set[str] = set()
        for text in _texts(raw):
            self.references.update(re.findall(r"\$\{([\w.]+)[}\[]", text))
        self.targets: list[tuple[Path, dict[str, Any], Any]] = []
        self.computed: list[tuple[Path, str, Any]] = []
        self.known: set[Path] = set()

    def run(self) -> None:
        self.check_fields((), self.raw, Settings)
        while self.targets:
            self.check_target(*self.targets.pop(0))
        # Last, since what they are computed from is more likely to be wrong, and then that is
        # named.
        for path, text, hint in self.computed:
            self.check(path, self.compute(path, text), hint)
        while self.targets:
            self.check_target(*self.targets.pop(0))

    def locate(self, path: Path, value: Any, via: tuple[Path, ...] = ()) -> tuple[Path, Any]:
        """Follow references from `path` to where its value was set; return that place and it."""
        if not isinstance(value, str) or not (match := REFERENCE.fullmatch(value)):
            return path, value
        if path in via:
            raise UserError(f"{name_of(path)}={value} refers to itself; give a value")
        other: Path = ()
        node: Any = self.raw
        for step in re.split(r"[.\[]", match[1].replace("]", "")):
            key = int(step) if isinstance(node, list) and step.isdigit() else step
            try:
                node = node[key]
            except (KeyError, IndexError, TypeError):
                raise UserError(
                    f"{name_of(path)}={value}: there is no key {match[1]}; give one, or a value"
                ) from None
            other, node = self.locate((*other, key), node, (*via, path))
        return other, node

    def check(self, path: Path, value: Any, hint: Any) -> None:
        """Check the value that stands at `path` against a hint."""
        place, value = self.locate(path, value)
        if value == "???":
            raise UserError(f"{name_of(place)} has no value yet; give one: {name_of(place)}=VALUE")
        if isinstance(value, str) and "${" in value:
            self.computed.append((place, value, hint))
        elif isinstance(value, dict):
            self.check_node(place, value, hint)
        elif isinstance(value, list) and (arguments := _arguments(hint, Sequence)):
            for i, item in enumerate(value):
                self.check((*place, i), item, arguments[0])
            if all(map(_is_plain, value)):
                self.compare(path, place, value, hint)
        else:
            self.compare(path, place, value, hint)

    def compare(self, path: Path, place: Path, value: Any, hint: Any) -> None:
        """Refuse a plain value that is not of the hint."""
        if not fits(value, hint):
            role = f" (as {name_of(path)})" if path != place else ""
            key = name_of(place)
            text = (
                f"{key}={show(value)}{role} must be "
                f"{describe(hint, value)}{nearest(key, value, hint)}"
            )
            raise UserError(text)

    def check_node(self, place: Path, node: dict[str, Any], hint: Any) -> None:
        """Check a node with a target, one of the schema's groups, or names with values."""
        if "_target_" in node:
            if place not in self.known:
                self.known.add(place)
                self.targets.append((place, node, hint))
            return
        base, _ = unwrap(hint)
        if inspect.isclass(base) and dataclasses.is_dataclass(base):
            self.check_fields(place, node, base)
        elif arguments := _arguments(hint, Mapping):
            for key, value in node.items():
                self.check((*place, str(key)), value, arguments[1])
        elif base is Any:
            for key, value in node.items():
                self.check((*place, str(key)), value, Any)
        else:
            self.compare(place, place, node, hint)

    def check_fields(self, place: Path, node: dict[str, Any], group: type) -> None:
        """Check a group of keys whose types are in the schema."""
        hints = get_type_hints(group, include_extras=True)
        for key, hint in hints.items():
            if key in node:
                self.check((*place, key), node[key], hint)
            elif not self.is_resumed:
                raise UserError(_absent(name_of((*place, key))))
        for key, value in node.items():
            if key not in hints and not self.is_resumed:
                self.check_unknown((*place, str(key)), value, hints)

    def check_unknown(self, path: Path, value: Any, names: Mapping[str, Any]) -> None:
        """Refuse a key that the schema does not know, unless it is for interpolations or for a
        private target.
        """
        key = name_of(path)
        if isinstance(value, dict) and "_target_" in value:
            self.check(path, value, Any)
        elif not any(other == key or other.startswith(f"{key}.") for other in self.references):
            raise UserError(
                f"{key}={show(value)}: no such key{meant(str(path[-1]), names)}; nothing refers to "
                f"it as ${{{key}}}, so it would have no effect"
            )

    def check_target(self, place: Path, node: dict[str, Any], hint: Any) -> None:
        """Check a node with a target: its kind, and its keys as `check_arguments` does."""
        name = name_of(place)
        if "_args_" in node:
            raise UserError(f"{name}._args_ cannot be set: give each argument by its name")
        for key, kind in SPECIAL.items():
            if key in node:
                self.check((*place, key), node[key], kind)
        _, word = self.locate((*place, "_target_"), node["_target_"])
        target = import_target(name, word)
        is_partial = bool(self.locate(place, node.get("_partial_"))[1])
        if not is_partial:
            require_kind(name, word, target, hint)
        elif place in WHOLE:
            raise UserError(
                f"{name}._partial_=true cannot be set: what stands there is built at once"
            )
        foreign = foreign_of(target)
        for key, reason in foreign.needed.items():
            if key not in parameters_of(target):
                raise UserError(f"{name}._target_={word} has no {key}: {reason}")
        self.check_arguments(place, node, target, word, is_partial)

    def check_arguments(
        self, place: Path, node: dict[str, Any], target: Any, word: str, is_partial: bool
    ) -> None:
        """Check that a node's keys are parameters of its target's signature, their values of its
        hints.
        """
        parameters = parameters_of(target)
        foreign = foreign_of(target)
        hints = {**hints_of(target), **foreign.hints}
        names = [str(key) for key in node if str(key) not in SPECIAL]
        for key in names:
            require_key(name_of((*place, key)), node[key], word, parameters, foreign)
        require_all(name_of(place), names, parameters, is_partial)
        for key in names:
            self.check((*place, key), node[key], hints.get(key, Any))

    def compute(self, path: Path, text: str) -> Any:
        """Return the value of an interpolation that is more than a reference."""
        node: Any = self.cfg
        try:
            for step in path:
                node = node[step]
        except OmegaConfBaseException as error:
            raise UserError(
                f"{name_of(path)}={text} cannot be computed: {explain(error)}"
            ) from error
        return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def _texts(node: Any) -> Iterator[str]:
    """Walk all texts below a node."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict | list):
        for child in node.values() if isinstance(node, dict) else node:
            yield from _texts(child)


def _is_plain(value: Any) -> bool:
    """Tell whether a value stands there as it is, and is neither a node nor an interpolation."""
    return not isinstance(value, dict) and "${" not in str(value)


def _arguments(hint: Any, kind: type) -> tuple[Any, ...]:
    """Return K and V of a hint's Mapping[K, V], or X of its Sequence[X]; empty for others."""
    base, _ = unwrap(hint)
    origin = get_origin(base)
    if origin in (Union, types.UnionType):
        return next(filter(None, (_arguments(option, kind) for option in get_args(base))), ())
    return get_args(base) if inspect.isclass(origin) and issubclass(origin, kind) else ()


def _absent(key: str) -> str:
    folder = CONF / key
    if not folder.is_dir():
        return f"missing configuration key {key}; give {key}=VALUE"
    options = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    return f"{key}: no option is chosen, and none can be left out; choose one of {options}"
