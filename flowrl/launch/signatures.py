"""Reads what a target takes from its signature, and compares a node's keys with it."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import types
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.utils import get_object

from flowrl.errors import UserError
from flowrl.launch.schema import FOREIGN, Foreign
from flowrl.values.wording import meant, show, unwrap


def import_target(name: str, word: str) -> Any:
    """The class or function of that dotted name. Raises UserError naming the node where there is
    none.
    """
    log = logging.getLogger(get_object.__module__)
    log.disabled = True  # it prints what the error says, too
    try:
        target = get_object(word)
    except (ImportError, AttributeError, ValueError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(f"{name}._target_={word}: no such class or function ({reason})") from error
    finally:
        log.disabled = False
    if not callable(target):
        raise UserError(f"{name}._target_={word} must be a class or a function")
    return target


def require_kind(name: str, word: str, target: Any, hint: Any) -> None:
    """A class must be one of the classes and protocols of the hint, where that can be said of a
    class.
    """
    base, _ = unwrap(hint)
    kinds = get_args(base) if get_origin(base) in (Union, types.UnionType) else (base,)
    classes = [
        kind
        for kind in kinds
        if inspect.isclass(kind) and get_origin(kind) is None and kind is not Any
    ]
    if not inspect.isclass(target) or len(classes) < len(
        [kind for kind in kinds if kind is not type(None)]
    ):
        return
    try:
        is_one = any(issubclass(target, kind) or kind.__name__ == "Node" for kind in classes)
    except TypeError:  # a protocol with attributes, of which only an instance can be asked
        return
    if not is_one:
        wanted = " or ".join(kind.__name__ for kind in classes if kind is not type(None))
        raise UserError(f"{name}._target_={word} is no {wanted}, which {name} must be")


@cache
def parameters_of(target: Any) -> dict[str, inspect.Parameter]:
    """The parameters of a target; any, where Python cannot tell them."""
    try:
        return dict(inspect.signature(target).parameters)
    except ValueError:  # of a few builtins
        return {"kwargs": inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)}


@cache
def hints_of(target: Any) -> dict[str, Any]:
    """The type hints of a target's parameters, with their bounds; none where they cannot be
    read.
    """
    declared: Any = target
    # Fields of a dataclass's base are read with the names of that base's own module.
    if inspect.isclass(target) and not dataclasses.is_dataclass(target):
        declared = target.__init__
    try:
        return get_type_hints(declared, include_extras=True)
    except (
        NameError,
        TypeError,
        AttributeError,
    ):
        # Names that another library imports for type checkers alone.
        if str(getattr(target, "__module__", "")).startswith("flowrl."):
            raise
        return {}


def foreign_of(target: Any) -> Foreign:
    """What the schema says of another library's class."""
    classes = inspect.getmro(target) if inspect.isclass(target) else ()
    names = [f"{kind.__module__}.{kind.__qualname__}" for kind in classes]
    return next((FOREIGN[name] for name in names if name in FOREIGN), Foreign())


def require_key(
    name: str, value: Any, word: str, parameters: Mapping[str, inspect.Parameter], foreign: Foreign
) -> None:
    """Refuse a key that the target does not take, or that this loop sets itself."""
    key = name.rpartition(".")[2]
    if key in foreign.refused:
        raise UserError(f"{name}={show(value)} cannot be set: {foreign.refused[key]}")
    is_open = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    if key not in parameters and not is_open:
        taken = ", ".join(each for each in parameters if each != "self") or "none"
        raise UserError(
            f"{name}={show(value)}: {word} has no such key{meant(key, parameters)}, but takes "
            f"{taken}; leave it out, "
            f"as ~{name} does"
        )


def require_all(
    name: str, given: Sequence[str], parameters: Mapping[str, inspect.Parameter], is_partial: bool
) -> None:
    """Refuse a node that lacks what its target needs; a partial one gets its positional arguments
    later.
    """
    for key, each in parameters.items():
        is_needed = each.default is each.empty and each.kind not in (
            each.VAR_KEYWORD,
            each.VAR_POSITIONAL,
        )
        is_later = is_partial and each.kind is not each.KEYWORD_ONLY
        if is_needed and not is_later and key not in given:
            raise UserError(
                f"{name}: missing configuration key '{key}'; give what another version's run "
                "lacks, as in "
                f"++{name}.{key}=VALUE"
            )
