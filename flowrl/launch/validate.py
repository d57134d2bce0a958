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


def validate(cfg: DictConfig, *, allows_other_keys: bool = False) -> None:
    """Raise UserError, in one line, for the first key whose value is not of its type or out of its
    bounds.

    A run of another version, which `allows_other_keys`, may lack keys that nothing reads, and have
    some that nothing knows.
    """
    raw = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(raw, dict)
    if raw.get("run_dir", "") is None:
        # It stands for the new folder, which is made later, and for all that take it from there.
        raw["run_dir"] = "outputs"
    _Walk(cfg, {str(key): value for key, value in raw.items()}, allows_other_keys).run()


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

    def __init__(self, cfg: DictConfig, raw: dict[str, Any], allows_other_keys: bool) -> None:
        self.cfg = cfg
        self.raw = raw
        self.allows_other_keys = allows_other_keys
        # The keys that an interpolation somewhere reads.
        self.references: set[str] = set()
        for text in _texts(raw):
            self.references.update(re.findall(r"\$\{([\w.]+)[}\[]", text))
        # Nodes with a target wait, since the first of them imports PyTorch.
        self.targets: list[tuple[Path, dict[str, Any], Any]] = []
        # Interpolations that a resolver computes, each with the hint that its value must meet.
        self.computed: list[tuple[Path, str, Any]] = []
        # A node that several keys refer to is checked once.
        self.known: set[Path] = set()

    def run(self) -> None:
        self.check_fields((), self.raw, Settings)
        self.check_targets()
        # Last, since what they are computed from is more likely to be wrong, and then that is
        # named.
        for path, text, hint in self.computed:
            value = self.compute(path, text)
            self.check(path, value, hint)
        # Those that stood in what was computed.
        self.check_targets()

    def check_targets(self) -> None:
        """Check the nodes that wait, and those that they bring, in the order in which they came."""
        while self.targets:
            place, node, hint = self.targets.pop(0)
            self.check_target(place, node, hint)

    def locate(self, path: Path, value: Any, via: tuple[Path, ...] = ()) -> tuple[Path, Any]:
        """Follow references from `path` to where its value was set; return that place and the
        value.

        `via` are the places that were passed on the way. Raises UserError for a reference to
        nothing, or to itself.
        """
        match = REFERENCE.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            return path, value
        if path in via:
            raise UserError(f"{name_of(path)}={value} refers to itself; give a value")
        other: Path = ()
        node: Any = self.raw
        # `optimizer.betas[0]` is read as optimizer, betas, 0.
        steps = re.split(r"[.\[]", match[1].replace("]", ""))
        for step in steps:
            key = int(step) if isinstance(node, list) and step.isdigit() else step
            try:
                node = node[key]
            except (KeyError, IndexError, TypeError):
                raise UserError(
                    f"{name_of(path)}={value}: there is no key {match[1]}; give one, or a value"
                ) from None
            # A node on the way may itself be a reference, below which the rest of the path lies.
            other, node = self.locate((*other, key), node, (*via, path))
        return other, node

    def check(self, path: Path, value: Any, hint: Any) -> None:
        """Check the value that stands at `path` against a hint."""
        place, value = self.locate(path, value)
        if value == "???":
            key = name_of(place)
            raise UserError(f"{key} has no value yet; give one: {key}=VALUE")
        if isinstance(value, str) and "${" in value:
            self.computed.append((place, value, hint))
        elif isinstance(value, dict):
            self.check_node(place, value, hint)
        elif isinstance(value, list) and _arguments(hint, Sequence):
            self.check_list(path, place, value, hint)
        else:
            self.compare(path, place, value, hint)

    def check_list(self, path: Path, place: Path, values: list[Any], hint: Any) -> None:
        """Check the entries of a list, and then its length and what else is asked of the whole."""
        (item_hint, *_) = _arguments(hint, Sequence)
        for i, item in enumerate(values):
            self.check((*place, i), item, item_hint)
        # A node or an interpolation is no value of the hint as it stands; its entry was checked.
        if all(map(_is_plain, values)):
            self.compare(path, place, values, hint)

    def compare(self, path: Path, place: Path, value: Any, hint: Any) -> None:
        """Refuse a plain value that is not of the hint. It was set at `place` and is read at
        `path`.
        """
        if fits(value, hint):
            return
        key = name_of(place)
        # The bound is that of the key that reads the value, so the message names both.
        role = f" (as {name_of(path)})" if path != place else ""
        bound = describe(hint, value)
        suggestion = nearest(key, value, hint)
        raise UserError(f"{key}={show(value)}{role} must be {bound}{suggestion}")

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
            self.check_values(place, node, arguments[1])
        elif base is Any:
            self.check_values(place, node, Any)
        else:
            self.compare(place, place, node, hint)

    def check_values(self, place: Path, node: dict[str, Any], hint: Any) -> None:
        """Check every value of a mapping against one hint."""
        for key, value in node.items():
            self.check((*place, str(key)), value, hint)

    def check_fields(self, place: Path, node: dict[str, Any], group: type) -> None:
        """Check a group of keys whose types are in the schema; one with a default may be absent."""
        hints = hints_of(group)
        for key, hint in hints.items():
            if key in node:
                self.check((*place, key), node[key], hint)
            elif not self.allows_other_keys and not hasattr(group, key):
                raise UserError(_absent(name_of((*place, key))))
        for key, value in node.items():
            if key not in hints and not self.allows_other_keys:
                self.check_unknown((*place, str(key)), value, hints)

    def check_unknown(self, path: Path, value: Any, names: Mapping[str, Any]) -> None:
        """Refuse a key that the schema does not know, unless it is for interpolations or for a
        private target.
        """
        key = name_of(path)
        if isinstance(value, dict) and "_target_" in value:
            self.check(path, value, Any)
            return
        is_read = any(other == key or other.startswith(f"{key}.") for other in self.references)
        if not is_read:
            suggestion = meant(str(path[-1]), names)
            raise UserError(
                f"{key}={show(value)}: no such key{suggestion}; nothing refers to "
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
        _, partial = self.locate(place, node.get("_partial_"))
        is_partial = bool(partial)
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
        # A misspelt key is told before the one that is then missing.
        for key in names:
            require_key(name_of((*place, key)), node[key], word, parameters, foreign)
        require_all(name_of(place), names, parameters, is_partial)
        for key in names:
            self.check((*place, key), node[key], hints.get(key, Any))

    def compute(self, path: Path, text: str) -> Any:
        """Return the value of an interpolation that is more than a reference.

        Raises UserError where a resolver fails.
        """
        node: Any = self.cfg
        try:
            for step in path:
                node = node[step]
        except OmegaConfBaseException as error:
            reason = explain(error)
            raise UserError(f"{name_of(path)}={text} cannot be computed: {reason}") from error
        if OmegaConf.is_config(node):
            return OmegaConf.to_container(node, resolve=True)
        return node


def _texts(node: Any) -> Iterator[str]:
    """Walk all texts below a node."""
    if isinstance(node, dict):
        node = list(node.values())
    if isinstance(node, str):
        yield node
    elif isinstance(node, list):
        for child in node:
            yield from _texts(child)


def _is_plain(value: Any) -> bool:
    """Tell whether a value stands there as it is, and is neither a node nor an interpolation."""
    return not isinstance(value, dict) and "${" not in str(value)


def _arguments(hint: Any, kind: type) -> tuple[Any, ...]:
    """Return K and V of a hint's Mapping[K, V], or X of its Sequence[X]; empty for others."""
    base, _ = unwrap(hint)
    origin = get_origin(base)
    if origin in (Union, types.UnionType):
        # Of a union such as Sequence[X] | None the first option that is of the kind.
        for option in get_args(base):
            if arguments := _arguments(option, kind):
                return arguments
        return ()
    if inspect.isclass(origin) and issubclass(origin, kind):
        return get_args(base)
    return ()


def _absent(key: str) -> str:
    """Say that a key has no value: of a group, that none of its options is chosen."""
    folder = CONF / key
    if not folder.is_dir():
        return f"missing configuration key {key}; give {key}=VALUE"
    options = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    return f"{key}: no option is chosen, and none can be left out; choose one of {options}"
