"""Values that all processes of a run share with each other."""

from __future__ import annotations

from typing import TypeVar

from torch import distributed

Shared = TypeVar("Shared")


def gather(value: Shared) -> list[Shared]:
    """Collect the values of all processes in rank order; a single process has its own alone."""
    if not is_distributed():
        return [value]
    # A list to be filled; what it holds before is of no account.
    values: list[Shared] = [value] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def is_distributed() -> bool:
    """Tell whether this process is one of several."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    return distributed.get_world_size() > 1
