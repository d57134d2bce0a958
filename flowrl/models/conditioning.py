"""Rows of conditioning are joined into one batch and taken apart again, whatever their shapes.

Prompts may give rows of different lengths: texts of unequal numbers of tokens, or pictures of
unequal sizes. Such rows are padded with zeros at the end of each axis, and a *companion* tensor
`<name>.shape` (int64, [B, axes]) keeps each row's true shape. Rows of one shape have no companion
and are joined as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Shaped
from torch import Tensor

from flowrl.types import Conditioning

COMPANION = ".shape"
"""The end of a companion's name, which no other tensor's may have."""

Row = Mapping[str, Tensor]
"""One prompt's tensors by name, without an axis of rows and without companions."""


def join(rows: Sequence[Row]) -> Conditioning:
    """Return one batch of rows, in order; `split` gives them back bitwise.

    Raises ValueError for no rows, for rows of different names, dtypes or numbers of axes, and for
    the name of a companion.
    """
    for row in rows:
        reserved = [name for name in row if name.endswith(COMPANION)]
        if reserved:
            raise ValueError(f"conditioning {reserved[0]!r}: {COMPANION} ends companions alone")
    batches = [{name: value[None] for name, value in row.items()} for row in rows]
    return concatenate([Conditioning(batch) for batch in batches])


def split(conditioning: Conditioning) -> list[dict[str, Tensor]]:
    """Return each row's tensors in their true shapes, as views; the negative is left out."""
    rows: list[dict[str, Tensor]] = [{} for _ in range(len(conditioning))]
    for name in names(conditioning):
        tensor = conditioning.tensors[name]
        for number, shape in enumerate(row_shapes(conditioning, name)):
            rows[number][name] = _cut(tensor[number], shape)
    return rows


def concatenate(parts: Sequence[Conditioning]) -> Conditioning:
    """Return the rows of all parts, padded where shapes differ, without negatives.

    Raises ValueError for no parts, and for parts of different names, dtypes or numbers of axes.
    """
    if not parts:
        raise ValueError("no rows of conditioning to join")
    found = [set(names(part)) for part in parts]
    for other in found:
        if other != found[0]:
            raise ValueError(
                f"rows of conditioning have different names: {sorted(found[0])} and {sorted(other)}"
            )
    tensors: dict[str, Tensor] = {}
    for name in names(parts[0]):
        tensors |= _joined(name, parts)
    return Conditioning(tensors)


def repeated(conditioning: Conditioning, count: int) -> Conditioning:
    """Return one row `count` times, expanded rather than copied, without its negative."""
    assert len(conditioning) == 1
    return Conditioning(
        {
            name: value.expand(count, *value.shape[1:])
            for name, value in conditioning.tensors.items()
        }
    )


def names(conditioning: Conditioning) -> list[str]:
    """Return the names of the tensors without companions."""
    return [name for name in conditioning.tensors if not name.endswith(COMPANION)]


def row_shapes(conditioning: Conditioning, name: str) -> list[tuple[int, ...]]:
    """Return the true shape of every row of a tensor. Where there is a companion, it is read from
    the device.
    """
    companion = conditioning.tensors.get(name + COMPANION)
    if companion is not None:
        return [tuple(shape) for shape in companion.tolist()]
    tensor = conditioning.tensors[name]
    return [tuple(tensor.shape[1:])] * len(tensor)


def _joined(name: str, parts: Sequence[Conditioning]) -> dict[str, Tensor]:
    """Return all rows of one tensor, and their companion where their shapes differ."""
    tensors = [part.tensors[name] for part in parts]
    kinds = {f"{tensor.dtype} of {tensor.ndim - 1} axes" for tensor in tensors}
    if len(kinds) > 1:
        raise ValueError(f"rows of conditioning {name!r} differ: {' and '.join(sorted(kinds))}")
    is_padded = any(name + COMPANION in part.tensors for part in parts)
    if not is_padded and len({tensor.shape[1:] for tensor in tensors}) == 1:
        return {name: torch.cat(tensors)}
    shapes = [shape for part in parts for shape in row_shapes(part, name)]
    whole = tuple(max(sizes) for sizes in zip(*shapes, strict=True))
    joined = {name: torch.cat([_resized(tensor, whole) for tensor in tensors])}
    # Parts may be padded for the sake of rows that are no longer among them.
    if len(set(shapes)) > 1:
        joined[name + COMPANION] = torch.tensor(shapes, device=tensors[0].device)
    return joined


def _resized(tensor: Shaped[Tensor, "B ..."], shape: tuple[int, ...]) -> Shaped[Tensor, "B ..."]:
    """Return rows of this shape: what lies beyond is padding and left out, what lacks is zeros."""
    if tuple(tensor.shape[1:]) == shape:
        return tensor
    kept = _cut(tensor, (len(tensor), *shape))
    padded = tensor.new_zeros(len(tensor), *shape)
    padded[tuple(slice(size) for size in kept.shape)] = kept
    return padded


def _cut(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the beginning of each axis, up to these sizes."""
    return tensor[tuple(slice(size) for size in shape)]
