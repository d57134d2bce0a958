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
from pydantic_core import SchemaError

from flowrl.values.bounds import Told

LENGTH = 80
"""Characters of a value that a message repeats."""

CONTAINED = 3
"""Letters of a word from which on names that contain it are near."""

CHOICES = 3
"""Names that a message may suggest at once."""

PLAIN = (int, float, bool, str, list, dict, type(None), Any)

OBVIOUS = 10_000
"""Upper bounds from here on are told only to whom they concern."""


def fits(value: Any, hint: Any) -> bool:
    """Tell whether a plain value is one of the hint, without any conversion but that of whole
    numbers to floats.
    """
    base, _ = unwrap(hint)
    if _is_union(base):
        return any(fits(value, kind) for kind in get_args(base))
    if get_origin(base) is Literal:
        # Types are compared too, since 0 is not false.
        words = [(type(word), word) for word in get_args(base)]
        return (type(value), value) in words
    if _is_object(base):
        return False  # which only a node with a target can make
    try:
        adapter = _adapter(hint)
    except TypeError:
        return True  # a private hint that cannot be hashed is not checked
    if adapter is None:
        return True
    try:
        # Strictly, pydantic still takes 1 for a float, but neither "1" nor true for a number.
        adapter.validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def _is_object(base: Any) -> bool:
    """Tell whether a hint is a class that no plain value of a configuration belongs to."""
    is_class = inspect.isclass(base) and get_origin(base) is None
    return is_class and base not in PLAIN


@cache
def _adapter(hint: Any) -> Any:
    """Return pydantic's check of a hint; None where it has none, as for a type variable of another
    library's.
    """
    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except (PydanticUserError, SchemaError, NameError):
        return None


def describe(hint: Any, value: Any = None) -> str:
    """Return a hint in words, as they follow "must be": "a whole number of at least 1".

    Upper bounds that guard against slips alone are left out, unless the `value` breaks them.
    """
    base, bounds = unwrap(hint)
    told = [bound.text for bound in bounds if isinstance(bound, Told)]
    if told:
        return told[-1]  # the outermost
    if _is_union(base):
        # Null first: "null or a whole number of at least 1".
        kinds = sorted(get_args(base), key=lambda kind: kind is not type(None))
        words = [describe(kind, value) for kind in kinds]
        return " or ".join(words)
    if get_origin(base) is Literal:
        return _listed([show(word) for word in get_args(base)])
    if base in _NUMBERS:
        return _number(_NUMBERS[base], bounds, value)
    return _collection(base) or _KINDS.get(base, "a node with a _target_")


def _collection(base: Any) -> str | None:
    """Describe what a mapping or a list of known entries holds; None for any other hint."""
    origin = get_origin(base)
    entries = get_args(base)
    if origin is None or not entries:
        return None
    if issubclass(origin, Mapping):
        return f"names with values, each of them {describe(entries[1])}"
    if issubclass(origin, Sequence):
        return f"a list, each of its entries {describe(entries[0])}"
    return None


def _is_union(base: Any) -> bool:
    # Union[int, None] and int | None have different types until Python 3.14.
    return get_origin(base) in (Union, types.UnionType)


def unwrap(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return a hint without its annotations, and these."""
    if get_origin(hint) is Annotated:
        base, *bounds = get_args(hint)
        return base, tuple(bounds)
    return hint, ()


def _number(kind: str, bounds: Sequence[Any], value: Any) -> str:
    """Describe a number with its bounds: "a whole number of at least 1 and at most 100"."""
    article = "a finite" if Predicate(math.isfinite) in bounds else "a"
    limits = [_limit(bound, value) for bound in bounds]
    words = " and ".join(filter(None, limits))
    return f"{article} {kind} {words}".strip()


def _limit(bound: Any, value: Any) -> str | None:
    """Return one bound of a number in words; None where it is none, or not worth telling."""
    match bound:
        case Ge(ge=least):
            return f"of at least {least}"
        case Gt(gt=least):
            return f"above {least}"
        case Le(le=most) if _matters(most, value):
            return f"at most {most}"
        case Lt(lt=most) if _matters(most, value):
            return f"below {most}"
    return None


def _matters(most: Any, value: Any) -> bool:
    """Tell whether an upper bound says more than that there is one, or is what the value breaks."""
    is_broken = isinstance(value, int | float) and value >= most
    return most < OBVIOUS or is_broken


_NUMBERS: dict[Any, str] = {int: "whole number", float: "number"}
_KINDS: dict[Any, str] = {
    bool: "true or false",
    str: "text that is not empty",
    type(None): "null",
    Any: "anything",
    list: "a list",
    dict: "names with values",
}


def _listed(words: Sequence[str]) -> str:
    """List one word or more: "a, b or c"."""
    *others, last = words
    if not others:
        return last
    return f"{', '.join(others)} or {last}"


def show(value: Any) -> str:
    """Return a value as the command line has it, in one line, its end left out where it is long."""
    if isinstance(value, bool):
        text = str(value).lower()
    elif value is None:
        text = "null"
    elif isinstance(value, str):
        # Line ends are white space too.
        text = " ".join(value.split()) or "''"
    elif isinstance(value, Mapping):
        items = [f"{key}: {show(item)}" for key, item in value.items()]
        text = "{" + ", ".join(items) + "}"
    elif isinstance(value, Sequence):
        text = "[" + ", ".join(map(show, value)) + "]"
    else:
        text = str(value)
    if len(text) <= LENGTH:
        return text
    return text[: LENGTH - 3] + "..."


def nearest(key: str, value: Any, hint: Any) -> str:
    """Return the nearest right form of a wrong value, as the end of a message; empty where none is
    near.
    """
    # A form of the value itself comes before a word that only looks like it.
    for other in _forms(value, hint):
        if fits(other, hint):
            return f"; write {key}={_quoted(other)}"
    if isinstance(value, str):
        return meant(value, _words(hint))
    return ""


def meant(word: str, names: Iterable[str]) -> str:
    """Return the nearest of some names to a misspelt one, as words for a message; empty where none
    is near.
    """
    known = sorted(names)
    close = difflib.get_close_matches(word, known, n=1)
    if not close and len(word) >= CONTAINED:
        # The beginning of longer names, such as sd35 of sd35_medium, before what they only hold.
        close = [name for name in known if name.startswith(word)]
        close = close or [name for name in known if word in name]
    if not 1 <= len(close) <= CHOICES:
        return ""
    return f" (did you mean {_listed([repr(name) for name in close])}?)"


_SWITCHES = {"yes": True, "on": True, "no": False, "off": False}


def _forms(value: Any, hint: Any) -> Iterable[Any]:
    """Yield other values that were perhaps meant."""
    if isinstance(value, str):
        yield from _readings(value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield from _spellings(value)
    if _may_be_entry(value, hint):
        yield [value]


def _readings(word: str) -> Iterable[Any]:
    """Yield the number or the switch that a word spells."""
    is_decimal = re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?", word, re.IGNORECASE)
    if re.fullmatch(r"-?\d+", word):
        yield int(word)
    elif is_decimal and word.count(".") < 2:
        yield float(word)
    if word.lower() in _SWITCHES:
        yield _SWITCHES[word.lower()]


def _spellings(number: float) -> Iterable[Any]:
    """Yield a number as a whole one, where it is, and as text."""
    if isinstance(number, float) and number.is_integer():
        yield int(number)
    if math.isfinite(number):
        yield str(number)


def _may_be_entry(value: Any, hint: Any) -> bool:
    """Tell whether a list of the value alone may be meant."""
    if value is None or isinstance(value, list | dict):
        return False
    # A wrong word is no list where a single word would be right.
    return not (isinstance(value, str) and _takes_text(hint))


def _takes_text(hint: Any) -> bool:
    """Tell whether a single word may be right."""
    base, _ = unwrap(hint)
    if _is_union(base):
        return any(_takes_text(kind) for kind in get_args(base))
    return base is str


def _quoted(value: Any) -> str:
    """Return a value as it is typed: a text in YAML's quotes, and these in the shell's."""
    if isinstance(value, str):
        return f"\"'{value}'\""
    return show(value)


def _words(hint: Any) -> list[str]:
    """Return the words that a hint allows."""
    base, _ = unwrap(hint)
    if get_origin(base) is Literal:
        return [word for word in get_args(base) if isinstance(word, str)]
    words = []
    if _is_union(base):
        for kind in get_args(base):
            words += _words(kind)
    return words
