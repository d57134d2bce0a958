"""What a pipeline's method returned, as tensors by name and a layout that puts them together again.

A tensor's *batch axis* is the one that is twice as long for two equal rows as for one. A layout is
plain data, so that it can be kept beside the tensors of a prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from jaxtyping import Shaped, UInt8
from torch import Tensor

from flowrl.models.derived.leaving import Refused

LAYOUT = "layout"
"""The name of the tensor that holds a row's layout, as the bytes of its JSON."""

ENTRIES = "entries"
"""Stands where an axis would: a list that has one entry a row."""

Axes = dict[str, "int | str | None"]
"""By path: a tensor's batch axis, ENTRIES for a list, None for a tensor that all rows share."""

Layout = dict[str, Any]

WORDS = {list: "list", tuple: "tuple", dict: "dict"}
"""The kinds of values that hold others; their layouts are lists of places and layouts."""


def find_axes(one: Any, two: Any, path: str) -> Axes:
    """Compare what one row and two equal rows gave, and return what tells their batch axes.

    Raises Refused where that is not one axis that grows from 1 to 2.
    """
    if isinstance(one, Tensor):
        return {path: _axis(one, two, path)}
    if isinstance(one, list) and len(one) == 1 and len(two) == 2:
        return {path: ENTRIES} | find_axes(one[0], two[0], f"{path}.0")
    axes: Axes = {}
    if isinstance(one, (list, tuple, dict)):
        if len(one) != len(two):
            raise Refused(f"{path} has {len(one)} values for a row and {len(two)} for two")
        for name, value in _items(one):
            axes |= find_axes(value, two[name], f"{path}.{name}")
    return axes


def _axis(one: Tensor, two: Any, path: str) -> int | None:
    """Return the axis by which two tensors differ; None where they have one shape."""
    shapes = (tuple(one.shape), tuple(two.shape)) if isinstance(two, Tensor) else ((), (0,))
    if len(shapes[0]) == len(shapes[1]):
        differing = [axis for axis in range(one.ndim) if shapes[0][axis] != shapes[1][axis]]
        if not differing:
            return None
        if len(differing) == 1 and [shape[differing[0]] for shape in shapes] == [1, 2]:
            return differing[0]
    is_sum = len(shapes[0]) == len(shapes[1]) == 1 and shapes[1][0] == shapes[0][0] + 1
    raise Refused(
        f"{path} is {shapes[0]} for a row and {shapes[1]} for two: no axis is the rows'"
        + (", as of a running sum over rows" if is_sum else "")
    )


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    """Walk the values of a list, tuple or dictionary with their places."""
    yield from value.items() if isinstance(value, dict) else enumerate(value)


def flatten(
    value: Any, path: str, axes: Axes, tensors: dict[str, Tensor], *, is_entry: bool = False
) -> Layout:
    """Take what one row gave apart: its tensors go into `tensors` by path, without their batch
    axis; return the layout. Below an entry, which is one row's alone, nothing is shared.

    Raises Refused for a value that is none of a few plain kinds, and for
    one at a path where there was none before.
    """
    match value:
        case Tensor():
            return _flatten_tensor(value, path, axes, tensors, is_entry)
        case None | bool() | int() | float() | str():
            return {"value": value}
        case list() if axes.get(path) == ENTRIES:
            if len(value) != 1:
                raise Refused(f"{path} has {len(value)} entries for one row")
            return {ENTRIES: flatten(value[0], f"{path}.0", axes, tensors, is_entry=True)}
        case list() | tuple() | dict() if type(value) in WORDS:
            parts = [
                [name, flatten(item, f"{path}.{name}", axes, tensors, is_entry=is_entry)]
                for name, item in _items(value)
            ]
            return {WORDS[type(value)]: parts}
    raise Refused(f"{path} is a {type(value).__name__}, which cannot be recorded")


def _flatten_tensor(
    value: Tensor, path: str, axes: Axes, tensors: dict[str, Tensor], is_entry: bool
) -> Layout:
    if path not in axes:
        raise Refused(f"{path} is a tensor for some prompts alone")
    axis = axes[path]
    assert not isinstance(axis, str)
    row = value if axis is None else value.select(axis, 0)
    tensors[path] = row
    layout: Layout = {"tensor": path, "axis": axis, "shape": list(row.shape)}
    if axis is None and not is_entry:
        # Rows that go through one call share this tensor, so they must agree in it.
        layout["digest"] = _digest(row)
    return layout


def _digest(value: Tensor) -> str:
    content = value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(content).hexdigest()[:16]


def to_tensor(layout: Layout) -> UInt8[Tensor, "N"]:
    """Return a layout as the bytes of its JSON."""
    text = json.dumps(layout, sort_keys=True, separators=(",", ":"))
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def groups(layouts: UInt8[Tensor, "B N"]) -> dict[bytes, list[int]]:
    """Return the numbers of the rows of each layout, in order. Their tensors have the same shapes
    and can go through one call. This waits for the device.
    """
    content = layouts.cpu().numpy()
    numbers: dict[bytes, list[int]] = {}
    for number, row in enumerate(content):
        # Zeros are padding: JSON holds none.
        numbers.setdefault(row.tobytes().rstrip(b"\0"), []).append(number)
    return numbers


@cache
def read(text: bytes) -> Layout:
    """Read a layout of `to_tensor`, padding removed."""
    layout: Layout = json.loads(text)
    return layout


def unflatten(layout: Layout, rows: Mapping[str, Shaped[Tensor, "B ..."]]) -> Any:
    """Put together what a method would return for these rows, which all have this layout; their
    tensors may be padded.
    """
    match layout:
        case {"tensor": str(name), "axis": axis, "shape": shape}:
            return _unflatten_tensor(rows[name], axis, shape)
        case {"value": value}:
            return value
        case {"entries": entry}:
            return [unflatten_row(entry, rows, number) for number in range(count(rows))]
        case {"dict": parts}:
            return {name: unflatten(part, rows) for name, part in parts}
        case {"tuple": parts}:
            return tuple(unflatten(part, rows) for _, part in parts)
        case {"list": parts}:
            return [unflatten(part, rows) for _, part in parts]
    raise AssertionError(f"no layout: {layout}")


def count(rows: Mapping[str, Tensor]) -> int:
    """Return the number of rows."""
    return len(next(iter(rows.values())))


def unflatten_row(layout: Layout, rows: Mapping[str, Tensor], number: int) -> Any:
    """Put together the entry of one row in a list that has one a row."""
    return unflatten(layout, {name: value[number : number + 1] for name, value in rows.items()})


def _unflatten_tensor(value: Tensor, axis: int | None, shape: Sequence[int]) -> Tensor:
    if tuple(value.shape[1:]) != tuple(shape):
        value = value[(slice(None), *(slice(size) for size in shape))]
    return value[0] if axis is None else value.movedim(0, axis)
