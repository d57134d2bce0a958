"""The task that a GenEval prompt sets, read from its metadata.

Ghosh et al. 2023, arXiv 2310.11513, github.com/djghosh13/geneval. A prompt's metadata hold `tag`,
the task, and `include`, a list of `{"class": ..., "count": ...}` with perhaps a `color` and a
`position`, such as `["left of", 0]`: left of the objects of entry 0. `exclude`, a list of the same
kind, says how many there may not be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flowrl.errors import UserError
from flowrl.types import Prompt

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS = (
    *("red", "orange", "yellow", "green", "blue"),
    *("purple", "pink", "brown", "black", "white"),
)
RELATIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True, slots=True)
class Clause:
    """`count` objects of the class `name`, all of a colour where that is given, and all in a
    `relation` to those of the clause number `target`.
    """

    name: str
    count: int
    colour: str | None = None
    relation: str | None = None
    target: int = 0


@dataclass(frozen=True, slots=True)
class Task:
    """All that a prompt asks for: every clause of `include`, and fewer than the count of each of
    `exclude`.
    """

    tag: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...]


def read_task(prompt: Prompt) -> Task:
    """Read what a prompt asks for. Raises UserError, naming the prompt, for metadata that are not
    GenEval's.
    """
    tag = prompt.metadata.get("tag")
    include = prompt.metadata.get("include")
    try:
        if tag is None or include is None:
            raise UserError("its metadata lack `tag` or `include`, as data=geneval has them")
        if tag not in TAGS:
            raise UserError(f"tag={tag!r} is none of {', '.join(TAGS)}")
        included = _clauses(include, "include")
        if not included:
            raise UserError("`include` names no object")
        return Task(tag, included, _clauses(prompt.metadata.get("exclude", []), "exclude"))
    except UserError as error:
        raise UserError(f"prompt {prompt.text!r}: {error}") from error


def _clauses(entries: Any, key: str) -> tuple[Clause, ...]:
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        raise UserError(f"`{key}` is no list")
    return tuple(_clause(entry, number, key) for number, entry in enumerate(entries))


def _clause(entry: Any, number: int, key: str) -> Clause:
    """Read the entry of this number of `include` or `exclude`."""
    place = f"{key}[{number}]"
    if not isinstance(entry, Mapping) or not isinstance(entry.get("class"), str):
        raise UserError(f"{place} is no object with a `class`")
    count = entry.get("count")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise UserError(f"{place}: count={count!r} is no whole number of at least 1")
    colour = entry.get("color")
    if colour is not None and colour not in COLOURS:
        raise UserError(f"{place}: color={colour!r} is none of {', '.join(COLOURS)}")
    position = entry.get("position")
    if position is None:
        return Clause(entry["class"], count, colour)
    if not _is_position(position, number):
        raise UserError(
            f"{place}: position={position!r} is no pair of {', '.join(RELATIONS)} and the number "
            "of an earlier entry"
        )
    relation, target = position
    return Clause(entry["class"], count, colour, relation, target)


def _is_position(value: Any, number: int) -> bool:
    """Tell whether a value relates an entry of this number to an earlier one."""
    is_pair = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2
    return is_pair and value[0] in RELATIONS and value[1] in range(number)
