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


def gather_to_first(value: Shared) -> list[Shared] | None:
    """Collect the values of all processes in rank order in the first one; the others get None.

    For what is large, such as pictures, which the other processes would only throw away.
    """
    if not is_distributed():
        return [value]
    if distributed.get_rank():
        distributed.gather_object(value, None)
        return None
    values: list[Shared] = [value] * distributed.get_world_size()
    distributed.gather_object(value, values)
    return values


def is_distributed() -> bool:
    """Tell whether this process is one of several."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    return distributed.get_world_size() > 1
