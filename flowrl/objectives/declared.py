"""Refusal of metrics that a loss returns without saying what they mean."""

from __future__ import annotations

from collections.abc import Sequence

from flowrl.diagnostics import SQUARED
from flowrl.errors import UserError
from flowrl.losses.protocol import Loss
from flowrl.runs.glossary import is_known
from flowrl.types import LossOutput

OWNED_BY_LOSSES = (
    "trust/masked_fraction",
    "trust/masked_positive",
    "trust/masked_negative",
    "trust/delta",
    "trust/divergence_old",
    "preference/margin",
    "preference/accuracy",
)
"""The glossary's metrics that losses return; all its others are logged by FlowRL itself."""


def require_declared(loss: Loss, output: LossOutput) -> None:
    """Raise UserError for a metric of a loss that neither it nor the glossary defines.

    Asked of made-up samples before the first rollout, so that a name that nobody defined does not
    end a run after hours.
    """
    names = [name.removesuffix(SQUARED) for name in output.metrics]
    _refuse_names_of_others(loss, names)
    _refuse_definitions_anew(loss)
    unknown = sorted(name for name in names if not is_known(name, loss.metrics))
    if unknown:
        raise UserError(
            f"loss={loss.name} returns the metric {unknown[0]!r}, which it does not define; add it "
            f"to {type(loss).__name__}.metrics with a sentence that says what it means"
        )


def _refuse_names_of_others(loss: Loss, names: Sequence[str]) -> None:
    """Raise UserError for a metric under whose name FlowRL logs something else."""
    taken = [name for name in names if name not in OWNED_BY_LOSSES and is_known(name)]
    if taken:
        raise UserError(
            f"loss={loss.name} returns the metric {taken[0]!r}, which FlowRL logs itself; leave it "
            "out, or log it under a name of your own"
        )


def _refuse_definitions_anew(loss: Loss) -> None:
    """Raise UserError where a loss gives a metric of the glossary another meaning."""
    clashing = [name for name in loss.metrics if is_known(name) or "/" not in name]
    if clashing:
        raise UserError(
            f"loss={loss.name} defines the metric {clashing[0]!r} anew; give it a first segment of "
            "its own, such as acme/weight"
        )
