"""The signature of a target, which says what keys its node may have, and their comparison."""

from __future__ import annotations

import inspect
import logging
import types
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.utils import get_object

from flowrl.errors import UserError, first_line
from flowrl.launch.schema import FOREIGN, Foreign
from flowrl.values.wording import meant, show, unwrap


def import_target(name: str, word: str) -> Any:
    """Import the class or function of that dotted name. Raises UserError naming the node where
    there is none.
    """
    log = logging.getLogger(get_object.__module__)
    log.disabled = True  # it prints what the error says, too
    try:
        target = get_object(word)
    except (ImportError, AttributeError, ValueError) as error:
        # Hydra's message repeats the name; what Python said of it is the cause.
        reason = first_line(error.__cause__ or error)
        raise UserError(f"{name}._target_={word}: no such class or function ({reason})") from error
    finally:
        log.disabled = False
    if not callable(target):
        raise UserError(f"{name}._target_={word} must be a class or a function")
    return target


def require_kind(name: str, word: str, target: Any, hint: Any) -> None:
    """Raise UserError for a class that is none of the classes and protocols of the hint, where that
    can be said of a class.
    """
    classes = _classes_of(hint)
    # A function may return anything, and of Sequence[X] or Any there is no subclass.
    if not inspect.isclass(target) or not all(map(_is_plain_class, classes)):
        return
    try:
        is_one = any(issubclass(target, kind) or kind.__name__ == "Node" for kind in classes)
    except TypeError:  # a protocol with attributes, of which only an instance can be asked
        return
    if not is_one:
        wanted = " or ".join(kind.__name__ for kind in classes)
        raise UserError(f"{name}._target_={word} is no {wanted}, which {name} must be")


def _classes_of(hint: Any) -> list[Any]:
    """Return what a hint allows, without None: each type of a union, or the hint itself."""
    base, _ = unwrap(hint)
    is_union = get_origin(base) in (Union, types.UnionType)
    kinds = get_args(base) if is_union else (base,)
    return [kind for kind in kinds if kind is not type(None)]


def _is_plain_class(kind: Any) -> bool:
    return inspect.isclass(kind) and get_origin(kind) is None and kind is not Any


@cache
def parameters_of(target: Any) -> dict[str, inspect.Parameter]:
    """Return the parameters of a target; any keyword, where Python cannot tell them."""
    try:
        return dict(inspect.signature(target).parameters)
    except ValueError:  # of a few builtins
        return {"kwargs": inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)}


@cache
def hints_of(target: Any) -> dict[str, Any]:
    """Return the type hints of a target's parameters, with their bounds; none where they cannot be
    read.
    """
    declared: Any = target
    if inspect.isclass(target):
        owner = next(kind for kind in target.__mro__ if "__init__" in vars(kind))
        # Fields of a dataclass's base are read with the names of that base's own module.
        declared = owner if "__dataclass_fields__" in vars(owner) else target.__init__
    try:
        return get_type_hints(declared, include_extras=True)
    except (NameError, TypeError, AttributeError):
        # Names that another library imports for type checkers alone.
        if str(getattr(target, "__module__", "")).startswith("flowrl."):
            raise
        return {}


def foreign_of(target: Any) -> Foreign:
    """Look up what the schema says of another library's class, or of the nearest class that it
    inherits from; nothing is said of a function.
    """
    classes = inspect.getmro(target) if inspect.isclass(target) else ()
    for kind in classes:
        name = f"{kind.__module__}.{kind.__qualname__}"
        if name in FOREIGN:
            return FOREIGN[name]
    return Foreign()


def require_key(
    name: str, value: Any, word: str, parameters: Mapping[str, inspect.Parameter], foreign: Foreign
) -> None:
    """Refuse a key that the target does not take, or that this loop sets itself."""
    key = name.rpartition(".")[2]
    if key in foreign.refused:
        raise UserError(f"{name}={show(value)} cannot be set: {foreign.refused[key]}")
    takes_any = any(known.kind is known.VAR_KEYWORD for known in parameters.values())
    if key not in parameters and not takes_any:
        taken = ", ".join(known for known in parameters if known != "self") or "none"
        suggestion = meant(key, parameters)
        raise UserError(
            f"{name}={show(value)}: {word} has no such key{suggestion}, but takes "
            f"{taken}; leave it out, as ~{name} does"
        )


def require_all(
    name: str, keys: Sequence[str], parameters: Mapping[str, inspect.Parameter], is_partial: bool
) -> None:
    """Refuse a node that lacks what its target needs; a partial one gets its positional arguments
    later.
    """
    for key, parameter in parameters.items():
        is_variadic = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        is_needed = parameter.default is parameter.empty and not is_variadic
        is_later = is_partial and parameter.kind is not parameter.KEYWORD_ONLY
        if is_needed and not is_later and key not in keys:
            raise UserError(
                f"{name}: missing configuration key '{key}'; give what another version's run "
                f"lacks, as in ++{name}.{key}=VALUE"
            )
