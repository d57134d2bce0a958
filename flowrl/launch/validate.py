"""Checks types and bounds of every key of a composed configuration before anything heavy loads.

A key's type is in the signature of what its node's `_target_` names, or in `flowrl.launch.schema`; pydantic compares,
without conversions. Keys that need no target come first, so that most slips are answered before PyTorch is imported. A
value is named by the key where it was set: `loss.clip_low: ${trust.clip}` is told as trust.clip.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flowrl.bounds import Dotted
from flowrl.errors import UserError
from flowrl.launch.compose import CONF
from flowrl.launch.errors import explain, meant
from flowrl.launch.schema import FOREIGN, Foreign, Settings
from flowrl.launch.wording import describe, fits, nearest, show, unwrap

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


def validate(cfg: DictConfig, *, is_resumed: bool = False) -> None:
    """Raise UserError, in one line, for the first key whose value is not of its type or out of its bounds.

    A run of another version, which `is_resumed`, may lack keys that nothing reads, and have some that nothing knows.
    """
    raw = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(raw, dict)
    if raw.get("run_dir", "") is None:
        raw["run_dir"] = "outputs"  # the new folder, which is made later, stands for all that take it from there
    _Walk(cfg, {str(key): value for key, value in raw.items()}, is_resumed).run()


def name_of(path: Path) -> str:
    """A path as the command line has it: lora.rank, optimizer.betas[0]."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}"
    return text.removeprefix(".")


class _Walk:
    """One pass over a configuration; `raw` is its plain form with interpolations as they are written."""

    def __init__(self, cfg: DictConfig, raw: dict[str, Any], is_resumed: bool) -> None:
        self.cfg, self.raw, self.is_resumed = cfg, raw, is_resumed
        self.references = {match for text in _texts(raw) for match in re.findall(r"\$\{([\w.]+)[}\[]", text)}
        self.targets: list[tuple[Path, dict[str, Any], Any]] = []
        self.computed: list[tuple[Path, str, Any]] = []
        self.known: set[Path] = set()

    def run(self) -> None:
        self.check_fields((), self.raw, Settings)
        while self.targets:
            self.check_target(*self.targets.pop(0))
        # Last, since what they are computed from is more likely to be wrong, and then that is named.
        for path, text, hint in self.computed:
            self.check(path, self.compute(path, text), hint)
        while self.targets:
            self.check_target(*self.targets.pop(0))

    def locate(self, path: Path, value: Any, via: tuple[Path, ...] = ()) -> tuple[Path, Any]:
        """Where the value at `path` was set, and it: references are followed to their end."""
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
                raise UserError(f"{name_of(path)}={value}: there is no key {match[1]}; give one, or a value") from None
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
        elif isinstance(value, list) and (items := _arguments(hint, Sequence)):
            for i, item in enumerate(value):
                self.check((*place, i), item, items[0])
            if not any(isinstance(item, dict) or "${" in str(item) for item in value):
                self.compare(path, place, value, hint)
        else:
            self.compare(path, place, value, hint)

    def compare(self, path: Path, place: Path, value: Any, hint: Any) -> None:
        """Refuse a plain value that is not of the hint."""
        if not fits(value, hint):
            role = f" (as {name_of(path)})" if path != place else ""
            key = name_of(place)
            text = f"{key}={show(value)}{role} must be {describe(hint, value)}{nearest(key, value, hint)}"
            raise UserError(text)

    def check_node(self, place: Path, node: dict[str, Any], hint: Any) -> None:
        """A node with a target, one of the schema's groups, or names with values."""
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
        """A group of keys whose types are in the schema."""
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
        """A key that the schema does not know is for interpolations or for a private target."""
        key = name_of(path)
        if isinstance(value, dict) and "_target_" in value:
            self.check(path, value, Any)
        elif not any(other == key or other.startswith(f"{key}.") for other in self.references):
            raise UserError(
                f"{key}={show(value)}: no such key{meant(str(path[-1]), names)}; nothing refers to it as "
                f"${{{key}}}, so it would have no effect"
            )

    def check_target(self, place: Path, node: dict[str, Any], hint: Any) -> None:
        """A node with a target: the keys must be parameters of its signature, their values of its hints."""
        for key, kind in SPECIAL.items():
            if key in node:
                self.check((*place, key), node[key], kind)
        _, word = self.locate((*place, "_target_"), node["_target_"])
        target = _import(place, word)
        is_partial = bool(self.locate(place, node.get("_partial_"))[1])
        if not is_partial:
            _require_kind(place, word, target, hint)
        parameters = _parameters(target)
        foreign, hints = _foreign(target), _hints(target)
        for key, reason in foreign.needed.items():
            if key not in parameters:
                raise UserError(f"{name_of(place)}._target_={word} has no {key}: {reason}")
        names = [str(key) for key in node if str(key) not in (*SPECIAL, "_args_")]
        for key in names:
            _require_key(name_of((*place, key)), node[key], word, parameters, foreign)
        if "_args_" not in node:
            _require_all(name_of(place), names, parameters, is_partial)
        for key in names:
            self.check((*place, key), node[key], foreign.hints.get(key, hints.get(key, Any)))

    def compute(self, path: Path, text: str) -> Any:
        """The value of an interpolation that is more than a reference."""
        node: Any = self.cfg
        try:
            for step in path:
                node = node[step]
        except OmegaConfBaseException as error:
            raise UserError(f"{name_of(path)}={text} cannot be computed: {explain(error)}") from error
        return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def _texts(node: Any) -> Iterator[str]:
    """All texts below a node."""
    if isinstance(node, str):
        yield node
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for child in children:
        yield from _texts(child)


def _arguments(hint: Any, kind: type) -> tuple[Any, ...]:
    """K and V of a hint's Mapping[K, V], or X of its Sequence[X]; empty where it has none."""
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


def _import(place: Path, word: str) -> Any:
    log = logging.getLogger(get_object.__module__)
    log.disabled = True  # it prints what the error says, too
    try:
        target = get_object(word)
    except (ImportError, AttributeError, ValueError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(f"{name_of(place)}._target_={word}: no such class or function ({reason})") from error
    finally:
        log.disabled = False
    if not callable(target):
        raise UserError(f"{name_of(place)}._target_={word} must be a class or a function")
    return target


def _require_kind(place: Path, word: str, target: Any, hint: Any) -> None:
    """A class must be one of the classes and protocols of the hint, where that can be said of a class."""
    base, _ = unwrap(hint)
    kinds = get_args(base) if get_origin(base) in (Union, types.UnionType) else (base,)
    classes = [kind for kind in kinds if inspect.isclass(kind) and get_origin(kind) is None]
    if not inspect.isclass(target) or len(classes) < len([kind for kind in kinds if kind is not type(None)]):
        return
    try:
        is_one = any(issubclass(target, kind) or kind.__name__ == "Node" for kind in classes)
    except TypeError:  # a protocol with attributes, of which only an instance can be asked
        return
    if not is_one:
        wanted = " or ".join(kind.__name__ for kind in classes if kind is not type(None))
        raise UserError(f"{name_of(place)}._target_={word} is no {wanted}, which {name_of(place)} must be")


def _parameters(target: Any) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(target).parameters)
    except ValueError:  # of a few builtins
        return {"kwargs": inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)}


def _hints(target: Any) -> dict[str, Any]:
    function = target.__init__ if inspect.isclass(target) else target
    try:
        return get_type_hints(function, include_extras=True)
    except (NameError, TypeError, AttributeError):  # names that another library imports for type checkers alone
        return {}


def _foreign(target: Any) -> Foreign:
    classes = inspect.getmro(target) if inspect.isclass(target) else ()
    names = [f"{kind.__module__}.{kind.__qualname__}" for kind in classes]
    return next((FOREIGN[name] for name in names if name in FOREIGN), Foreign())


def _require_key(
    name: str, value: Any, word: str, parameters: Mapping[str, inspect.Parameter], foreign: Foreign
) -> None:
    key = name.rpartition(".")[2]
    if key in foreign.refused:
        raise UserError(f"{name}={show(value)} cannot be set: {foreign.refused[key]}")
    is_open = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    if key not in parameters and not is_open:
        taken = ", ".join(each for each in parameters if each != "self") or "none"
        raise UserError(
            f"{name}={show(value)}: {word} has no such key{meant(key, parameters)}, but takes {taken}; leave it out, "
            f"as ~{name} does"
        )


def _require_all(
    name: str, given: Sequence[str], parameters: Mapping[str, inspect.Parameter], is_partial: bool
) -> None:
    for key, each in parameters.items():
        is_needed = each.default is each.empty and each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
        is_later = is_partial and each.kind is not each.KEYWORD_ONLY
        if is_needed and not is_later and key not in given:
            raise UserError(
                f"{name}: missing configuration key '{key}'; give what another version's run lacks, as in "
                f"++{name}.{key}=VALUE"
            )
