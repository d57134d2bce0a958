"""Values by names whose beginnings say what they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")


def below(values: Mapping[str, Value], prefix: str) -> dict[str, Value]:
    """Return the values whose names begin with a prefix, without it, in their order."""
    chosen = {}
    for name, value in values.items():
        if name.startswith(prefix):
            chosen[name.removeprefix(prefix)] = value
    return chosen
