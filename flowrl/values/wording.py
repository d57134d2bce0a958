"""Values, bounds and remedies in words, for messages about the configuration."""

from __future__ import annotations

import difflib
import inspect
import math
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, Predicate
from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from flowrl.values.bounds import Told

LENGTH = 80
"""Characters of a value that a message repeats."""

PLAIN = (int, float, bool, str, list, dict, type(None), Any)

OBVIOUS = 10_000
"""Upper bounds from here on are told only to whom they concern."""


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is one of the hint, without any conversion but that of whole numbers to
    floats.
    """
    base, _ = unwrap(hint)
    if get_origin(base) in (Union, types.UnionType):
        return any(fits(value, kind) for kind in get_args(base))
    if get_origin(base) is Literal:
        return any(
            value == word and type(value) is type(word) for word in get_args(base)
        )  # 0 is not false
    if inspect.isclass(base) and get_origin(base) is None and base not in PLAIN:
        return False  # an object, which only a node with a target can make
    adapter = _adapter(hint)
    if adapter is None:
        return True
    try:
        adapter.validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


@cache
def _adapter(hint: Any) -> Any:
    """Pydantic's check of a hint; None where it has none, as for a type variable of another
    library's.
    """
    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except (PydanticUserError, NameError):
        return None


def describe(hint: Any, value: Any = None) -> str:
    """A hint in words, as they follow "must be": "a whole number of at least 1".

    Upper bounds that guard against slips alone are left out, unless the `value` breaks them.
    """
    base, bounds = unwrap(hint)
    for bound in reversed(bounds):  # the outermost first
        if isinstance(bound, Told):
            return bound.text
    origin = get_origin(base)
    if origin in (Union, types.UnionType):
        kinds = sorted(get_args(base), key=lambda kind: kind is not type(None))
        return " or ".join(describe(kind, value) for kind in kinds)
    if origin is Literal:
        return _listed([show(word) for word in get_args(base)])
    if origin is not None and issubclass(origin, Mapping):
        return f"names with values, each of them {describe(get_args(base)[1])}"
    if origin is not None and issubclass(origin, Sequence) and get_args(base):
        return f"a list, each of its entries {describe(get_args(base)[0])}"
    if base in (int, float):
        return _number("whole number" if base is int else "number", bounds, value)
    return _KINDS.get(base, "a node with a _target_")


def unwrap(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """A hint without its annotations, and these."""
    if get_origin(hint) is Annotated:
        base, *bounds = get_args(hint)
        return base, tuple(bounds)
    return hint, ()


def _number(kind: str, bounds: Sequence[Any], value: Any) -> str:
    is_finite = any(
        isinstance(bound, Predicate) and bound.func is math.isfinite for bound in bounds
    )
    words = [f"a finite {kind}" if is_finite else f"a {kind}"]
    signs = []
    for bound in bounds:
        if isinstance(bound, Ge):
            signs.append(f"of at least {bound.ge}")
        elif isinstance(bound, Gt):
            signs.append(f"above {bound.gt}")
        elif isinstance(bound, Le) and _matters(bound.le, value):
            signs.append(f"at most {bound.le}")
        elif isinstance(bound, Lt) and _matters(bound.lt, value):
            signs.append(f"below {bound.lt}")
    return " ".join([*words, " and ".join(signs)]).strip()


def _matters(bound: Any, value: Any) -> bool:
    return bound < OBVIOUS or (isinstance(value, int | float) and value >= bound)


_KINDS: dict[Any, str] = {
    bool: "true or false",
    str: "text that is not empty",
    type(None): "null",
    Any: "anything",
    list: "a list",
    dict: "names with values",
}


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def show(value: Any) -> str:
    """A value as the command line has it, in one line, its end left out where it is long."""
    if isinstance(value, bool):
        text = str(value).lower()
    elif value is None:
        text = "null"
    elif isinstance(value, str):
        text = " ".join(value.split()) or "''"
    elif isinstance(value, Mapping):
        text = f"{{{', '.join(f'{key}: {show(item)}' for key, item in value.items())}}}"
    elif isinstance(value, Sequence):
        text = f"[{', '.join(map(show, value))}]"
    else:
        text = str(value)
    return text if len(text) <= LENGTH else f"{text[: LENGTH - 3]}..."


def nearest(key: str, value: Any, hint: Any) -> str:
    """The nearest right form of a wrong value, as the end of a message; empty where none is
    near.
    """
    for other in _forms(value, hint):
        if fits(other, hint):
            return f"; write {key}={_quoted(other)}"
    if isinstance(value, str):
        return meant(value, _words(hint))
    return ""


def meant(word: str, names: Iterable[str]) -> str:
    """The nearest of some names to a misspelt one, as words for a message; empty where none is
    near.
    """
    close = difflib.get_close_matches(word, sorted(names), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


_SWITCHES = {"yes": True, "on": True, "no": False, "off": False}


def _forms(value: Any, hint: Any) -> Iterable[Any]:
    """Other values that were perhaps meant."""
    if isinstance(value, float) and value.is_integer():
        yield int(value)
    if isinstance(value, str):
        if re.fullmatch(r"-?\d+", value):
            yield int(value)
        elif re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?", value, re.IGNORECASE) and value.count(".") < 2:
            yield float(value)
        if value.lower() in _SWITCHES:
            yield _SWITCHES[value.lower()]
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        yield str(value)
    # A wrong word is no list where a single word would be right.
    if (
        value is not None
        and not isinstance(value, list | dict)
        and not (isinstance(value, str) and _takes_text(hint))
    ):
        yield [value]


def _takes_text(hint: Any) -> bool:
    base, _ = unwrap(hint)
    if get_origin(base) in (Union, types.UnionType):
        return any(_takes_text(kind) for kind in get_args(base))
    return base is str


def _quoted(value: Any) -> str:
    return f"\"'{value}'\"" if isinstance(value, str) else show(value)


def _words(hint: Any) -> list[str]:
    """The words that a hint allows."""
    base, _ = unwrap(hint)
    if get_origin(base) is Literal:
        return [word for word in get_args(base) if isinstance(word, str)]
    if get_origin(base) in (Union, types.UnionType):
        return [word for kind in get_args(base) for word in _words(kind)]
    return []
