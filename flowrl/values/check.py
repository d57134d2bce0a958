"""Checks of configured values against the bounds that their hints state, where an object is made.

The launch checks a whole configuration before anything heavy loads; these are for whoever makes an
object in code. Both compare with the same hints, so that a bound is written once, where the value
is declared.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from enum import Enum
from typing import Any, ParamSpec, TypeVar, get_origin, get_type_hints

from flowrl.errors import UserError
from flowrl.values.wording import describe, fits, nearest, show, unwrap

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

PLAIN = (bool, int, float, str, list, tuple, type(None))
"""Types of the values that are compared; other objects are checked where they are made."""


def check_fields(instance: Any, group: str) -> None:
    """Compare each field that a dataclass is given with its hint; `__post_init__` calls it.

    Raises UserError, naming the field as `group` with a dot and its name, for the first one that
    its hint does not take.
    """
    kind: Any = type(instance)
    hints = _hints(kind)
    for field in dataclasses.fields(instance):
        if field.init:
            hint = hints.get(field.name, Any)
            check_value(f"{group}.{field.name}", getattr(instance, field.name), hint)


def checked(group: str) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Decorate a function or an `__init__` so that its arguments are compared with their hints.

    A call raises UserError, naming the argument as `group` with a dot and its name, or by its name
    alone where `group` is empty, before anything else happens.
    """

    def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            hints = _hints(function)
            # Defaults are not bound, and so not compared: they are the program's.
            arguments = signature.bind(*args, **kwargs).arguments
            for name, value in arguments.items():
                if name in hints:
                    key = f"{group}.{name}" if group else name
                    check_value(key, value, hints[name])
            return function(*args, **kwargs)

        return call

    return decorate


def check_value(key: str, value: Any, hint: Any) -> None:
    """Raise UserError, naming `key`, where a plain value is not one that the hint takes.

    Objects are not compared: whoever made them was.
    """
    # An Enum may be a str too, and is an object all the same.
    is_plain = isinstance(value, PLAIN) and not isinstance(value, Enum)
    if not is_plain or _is_instance(value, hint):
        return
    # Code may give a tuple where a configuration has a list.
    if not (fits(value, hint) or fits(_as_lists(value), hint)):
        text = f"{key}={show(value)} must be {describe(hint, value)}"
        raise UserError(f"{text}{nearest(key, value, hint)}")


def _is_instance(value: Any, hint: Any) -> bool:
    """Tell whether a hint is a class, other than of plain values, that the value belongs to."""
    base, _ = unwrap(hint)
    if not inspect.isclass(base) or base in PLAIN or get_origin(base) is not None:
        return False
    try:
        return isinstance(value, base)
    except TypeError:
        return False  # a protocol that cannot be asked at run time


def _as_lists(value: Any) -> Any:
    """Return a value with lists in place of tuples, as a configuration holds them."""
    if not isinstance(value, tuple):
        return value
    return [_as_lists(item) for item in value]


@functools.cache
def _hints(declared: Any) -> dict[str, Any]:
    """Read hints; a private module may name in them what only type checkers import."""
    try:
        # With the bounds, which are the extras of an annotation.
        return get_type_hints(declared, include_extras=True)
    except (NameError, TypeError, AttributeError):
        if str(getattr(declared, "__module__", "")).startswith("flowrl."):
            raise
        return {}
