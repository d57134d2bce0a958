"""Reward outputs are made and put together here, with the reasons of their missing samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flowrl.types import RewardOutput

REASON = "missing"
"""The key of a missing sample's `info` that says why."""

LARGEST = 1e12
"""A reward further from 0 is missing: the squares of such numbers, summed over a batch, leave
float32.
"""


def is_usable(values: Tensor) -> Bool[Tensor, "..."]:
    """Tell which values are numbers that statistics can be made of: neither NaN nor infinite, nor
    beyond `LARGEST`.
    """
    return values.abs() <= LARGEST


def all_valid(
    values: Float[Tensor, "B"], parts: Mapping[str, Float[Tensor, "B"]] | None = None
) -> RewardOutput:
    """Make the output of a scorer that scores every sample; `values` are on the CPU."""
    return RewardOutput(values, torch.ones(len(values), dtype=torch.bool), parts or {})


def finite_valid(
    values: Float[Tensor, "B"],
    parts: Mapping[str, Float[Tensor, "B"]],
    info: Sequence[Mapping[str, Any]],
) -> RewardOutput:
    """Make an output whose samples are missing where their values are NaN or infinite."""
    finite = torch.where(values.isfinite(), values, 0.0)
    return RewardOutput(finite, values.isfinite(), parts, info)


def scores_or_reasons(
    scores: Sequence[float | str],
) -> tuple[Float[Tensor, "B"], list[Mapping[str, Any]]]:
    """Separate scores from the reasons that stand in their place: values, NaN where there is a
    reason, and the samples' `info`.
    """
    values = []
    info: list[Mapping[str, Any]] = []
    for score in scores:
        if isinstance(score, str):
            values.append(torch.nan)
            info.append({REASON: score})
        else:
            values.append(score)
            info.append({})
    return torch.tensor(values), info


def missing(count: int, reason: str, weights: tuple[float, ...] | None = None) -> RewardOutput:
    """Make `count` samples without a score, all for the same reason; `weights` are those of a
    mixture, which has terms.
    """
    values = torch.zeros(count)
    is_valid = torch.zeros(count, dtype=torch.bool)
    info = [{REASON: reason}] * count
    if weights is None:
        return RewardOutput(values, is_valid, info=info)
    terms = torch.zeros(count, len(weights))
    return RewardOutput(values, is_valid, info=info, terms=terms, weights=weights)


def fill(output: RewardOutput, reasons: Mapping[int, str]) -> RewardOutput:
    """Put missing samples into an output: `reasons` says why, by the number that each has among
    all samples.
    """
    weights = None if output.terms is None else output.weights
    whole = concatenate([output, *(missing(1, reason, weights) for reason in reasons.values())])
    others = [row for row in range(len(whole.values)) if row not in reasons]
    # Row j of `whole` is sample [*others, *reasons][j]; the argsort inverts that.
    return reorder(whole, torch.tensor([*others, *reasons]).argsort())


def concatenate(outputs: Sequence[RewardOutput]) -> RewardOutput:
    """Join the outputs of consecutive samples into one, on the CPU.

    A part that one of them lacks is NaN there. Either all of them have terms, or none has.
    """
    values = torch.cat([output.values.cpu() for output in outputs])
    is_valid = torch.cat([output.is_valid.cpu() for output in outputs])
    names = dict.fromkeys(name for output in outputs for name in output.parts)
    parts = {name: _join_part(outputs, name) for name in names}
    info: list[Mapping[str, Any]] = []
    for output in outputs:
        info += output.info or [{}] * len(output.values)
    return RewardOutput(
        values,
        is_valid,
        parts,
        info,
        terms=_join_terms(outputs),
        weights=outputs[0].weights,
        applies=_join_applies(outputs),
    )


def _join_part(outputs: Sequence[RewardOutput], name: str) -> Float[Tensor, "B"]:
    pieces = []
    for output in outputs:
        absent = torch.full(output.values.shape, torch.nan)
        pieces.append(output.parts.get(name, absent).float().cpu())
    return torch.cat(pieces)


def _join_terms(outputs: Sequence[RewardOutput]) -> Float[Tensor, "B R"] | None:
    terms = [output.terms.cpu() for output in outputs if output.terms is not None]
    assert len(terms) in (0, len(outputs))
    return torch.cat(terms) if terms else None


def _join_applies(outputs: Sequence[RewardOutput]) -> Bool[Tensor, "B R"] | None:
    """Join what the rewards apply to, which stays None where all of them apply everywhere."""
    if all(output.applies is None for output in outputs):
        return None
    pieces = []
    for output in outputs:
        if output.applies is None:
            shape = (len(output.values), len(output.weights))
            pieces.append(torch.ones(shape, dtype=torch.bool))
        else:
            pieces.append(output.applies.cpu())
    return torch.cat(pieces)


def reorder(output: RewardOutput, rows: Int[Tensor, "N"]) -> RewardOutput:
    """Return the samples with these numbers, in this order."""
    parts = {name: values[rows] for name, values in output.parts.items()}
    info: Sequence[Mapping[str, Any]] = ()
    if output.info:
        info = [output.info[row] for row in rows.tolist()]
    return RewardOutput(
        output.values[rows],
        output.is_valid[rows],
        parts,
        info,
        terms=_rows_of(output.terms, rows),
        weights=output.weights,
        applies=_rows_of(output.applies, rows),
    )


def _rows_of(table: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if table is None else table[rows]


def first_reason(info: Sequence[Mapping[str, Any]]) -> str | None:
    """Return why the first missing sample is missing, where something says so."""
    return next((str(entry[REASON]) for entry in info if REASON in entry), None)
