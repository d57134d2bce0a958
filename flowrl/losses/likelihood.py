"""The refusals of losses whose ranges belong to one kind of log-probability."""

from __future__ import annotations

from flowrl.errors import UserError
from flowrl.types import LogProbForm, Reduction


def require_calibration(calibrated_for: str, *, form: LogProbForm, reduction: Reduction) -> None:
    """Raise UserError where a clip range meets log-probabilities it was not calibrated to.

    `calibrated_for` is the likelihood's form, for means as everything published, or `sum_` and it.
    """
    actual = form if reduction == "mean" else f"sum_{form}"
    if calibrated_for != actual:
        raise UserError(
            f"loss.calibrated_for={calibrated_for}, but likelihood.form={form} and "
            f"likelihood.reduction={reduction}: a clip range calibrated for one kind of "
            "log-probability means another trust region with the other; set "
            f"loss.calibrated_for={actual} together with a range that fits it"
        )


def require_gaussian(form: LogProbForm, *, loss: str) -> None:
    """Raise UserError where a loss that needs the Gaussian log-density gets another form."""
    if form != "gaussian":
        raise UserError(f"loss={loss} needs likelihood.form=gaussian, not {form}")
