"""Reward outputs put together, and the reasons that their missing samples carry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from flowrl.types import RewardOutput

REASON = "missing"
"""The key of a missing sample's `info` that says why."""

LARGEST = 1e12
"""A reward further from 0 is missing: the squares of such numbers, summed over a batch, leave
float32.
"""


def is_usable(values: Tensor) -> Bool[Tensor, "..."]:
    """Which values are numbers that statistics can be made of: neither NaN nor infinite, nor beyond
    `LARGEST`.
    """
    return values.abs() <= LARGEST


def missing(count: int, reason: str, weights: tuple[float, ...] | None = None) -> RewardOutput:
    """`count` samples without a score, all for the same reason; `weights` are those of a mixture,
    which has terms.
    """
    none = torch.zeros(count)
    info = [{REASON: reason}] * count
    if weights is None:
        return RewardOutput(none, none.bool(), {}, info)
    return RewardOutput(none, none.bool(), {}, info, torch.zeros(count, len(weights)), weights)


def fill(output: RewardOutput, reasons: Mapping[int, str]) -> RewardOutput:
    """The output with missing samples put in: `reasons` says why, by the number that each has among
    all samples.
    """
    weights = None if output.terms is None else output.weights
    whole = concatenate([output, *(missing(1, reason, weights) for reason in reasons.values())])
    others = [row for row in range(len(whole.values)) if row not in reasons]
    return reorder(whole, torch.tensor([*others, *reasons]).argsort())


def concatenate(outputs: Sequence[RewardOutput]) -> RewardOutput:
    """The outputs of consecutive samples as one, on the CPU. A part that one of them lacks is NaN
    there.
    """
    parts = {}
    for name in dict.fromkeys(name for output in outputs for name in output.parts):
        absent = [torch.full(output.values.shape, torch.nan) for output in outputs]
        found = [output.parts.get(name, none) for output, none in zip(outputs, absent, strict=True)]
        parts[name] = torch.cat([values.float().cpu() for values in found])
    info: list[Mapping[str, Any]] = []
    for output in outputs:
        info += output.info or [{}] * len(output.values)
    terms = [output.terms.cpu() for output in outputs if output.terms is not None]
    assert len(terms) in (0, len(outputs))
    applies = None
    if any(output.applies is not None for output in outputs):
        everywhere = [
            torch.ones(len(output.values), len(output.weights), dtype=torch.bool)
            for output in outputs
        ]
        own = [
            every if output.applies is None else output.applies.cpu()
            for output, every in zip(outputs, everywhere, strict=True)
        ]
        applies = torch.cat(own)
    return RewardOutput(
        torch.cat([output.values.cpu() for output in outputs]),
        torch.cat([output.is_valid.cpu() for output in outputs]),
        parts,
        info,
        torch.cat(terms) if terms else None,
        outputs[0].weights,
        applies,
    )


def reorder(output: RewardOutput, rows: Int[Tensor, "N"]) -> RewardOutput:
    """The samples with these numbers, in this order."""
    return RewardOutput(
        output.values[rows],
        output.is_valid[rows],
        {name: values[rows] for name, values in output.parts.items()},
        [output.info[row] for row in rows.tolist()] if output.info else (),
        None if output.terms is None else output.terms[rows],
        output.weights,
        None if output.applies is None else output.applies[rows],
    )


def first_reason(info: Sequence[Mapping[str, Any]]) -> str | None:
    """Why the first missing sample is missing, where something says so."""
    return next((str(entry[REASON]) for entry in info if REASON in entry), None)
