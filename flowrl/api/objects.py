"""Objects made in Python within a configuration, which holds text and numbers alone: a node names
the object, and instantiating the node gives it back.
"""

from __future__ import annotations

from typing import Any

_held: list[object] = []


def node_of(value: object) -> dict[str, Any]:
    """Return the configuration node that gives this very object."""
    _held.append(value)
    return {"_target_": f"{__name__}.held", "number": len(_held) - 1}


def held(number: int) -> object:
    """Return the object of a node that `node_of` made in this process."""
    return _held[number]


def release() -> None:
    """Forget all objects; their nodes give nothing from now on."""
    _held.clear()
