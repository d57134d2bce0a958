"""Flow-DPPO: the divergence mask, a trust region that decides by the exact divergence of a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from flowrl.errors import UserError
from flowrl.losses.likelihood import require_gaussian
from flowrl.losses.mask import masked_surrogate
from flowrl.losses.protocol import ReverseLoss
from flowrl.types import LogProbForm, LossInputs, LossOutput, Reduction
from flowrl.values.bounds import Limit, Positive, Threshold
from flowrl.values.check import check_fields

BUDGET_RANGE = 100.0
"""A threshold that holds a budget stays within this factor of it."""


@dataclass(kw_only=True)
class DPPO(ReverseLoss):
    """Mean over samples of -A r where kept and 0 where dropped; dropped terms count in the mean.

    Dropped if D >= delta and (A > 0 and r > 1, or A < 0 and r < 1): the step is already too far and
    the update moves it further. A KL is compared with delta plus the step's floor where
    `trust.above_floor` is set. Corrective updates always keep their gradient, and r is never
    clipped; A is, to +-advantage_clip.

    Paper: Flow-DPPO (Ping et al. 2026, arXiv 2606.11025), its mask M. D is KL(old || current) under
    the configured reduction (mean in every published threshold: 1e-6 in the authors' recipes, 1e-5
    in UniRL's), or TV, or mean (v - old_v)^2 (`velocity`, Flow-Factory's `v-based`); a threshold
    belongs to one of them, which `calibrated_for` names. Differs from Flow-Factory's code, which
    multiplies by the mask: 0 times an overflown ratio is NaN, `where` is not.

    The threshold is `delta`, or with `final_delta` the start of a geometric schedule over the run
    towards it. With `delta` "auto" it starts at `kl_budget` and after each iteration is multiplied
    by (kl_budget / mean KL)^(1/2), so that the mean KL(old || current) of the iterations' terms
    settles at the budget where the mask can hold it there. That needs more than two updates an
    iteration: the first, where the KL is 0, is never masked and alone makes the second one's KL.
    Schedule and budget are our own additions; the paper's threshold is fixed.
    """

    name: ClassVar[str] = "dppo"

    delta: Threshold | Literal["auto"]
    final_delta: Positive | None
    kl_budget: Positive | None
    divergence: Literal["kl", "tv", "velocity"]
    calibrated_for: Literal["kl", "sum_kl", "tv", "velocity"]
    advantage_clip: Limit

    threshold: float = field(init=False)
    """The threshold in force, which `begin` and `observe` may move away from `delta`."""

    def __post_init__(self) -> None:
        check_fields(self, "loss")
        if self.delta == "auto":
            self._check_budget()
            assert self.kl_budget is not None
            self.threshold = float(self.kl_budget)
            return
        self.threshold = float(self.delta)
        if self.kl_budget is not None:
            raise UserError(
                f"loss.kl_budget={self.kl_budget} is only for loss.delta=auto, not {self.delta}"
            )
        if self.final_delta is not None and not self.threshold > 0:
            raise UserError(
                f"loss.final_delta={self.final_delta} and loss.delta={self.delta} must both be "
                "positive"
            )

    def _check_budget(self) -> None:
        is_complete = self.kl_budget is not None and self.divergence == "kl"
        if not is_complete or self.final_delta is not None:
            raise UserError(
                f"loss.delta=auto needs a positive loss.kl_budget (not {self.kl_budget}), "
                "loss.divergence=kl and no loss.final_delta"
            )

    def check(self, *, form: LogProbForm, reduction: Reduction, sampler: str) -> None:
        self._check_likelihood(form, reduction)

    def _check_likelihood(self, form: LogProbForm, reduction: Reduction) -> None:
        require_gaussian(form, loss=self.name)
        is_sum = self.divergence == "kl" and reduction == "sum"
        needed = "sum_kl" if is_sum else self.divergence
        if self.calibrated_for != needed:
            raise UserError(
                f"loss.calibrated_for={self.calibrated_for}, but loss.divergence={self.divergence} "
                f"with likelihood.reduction={reduction}; set loss.calibrated_for={needed}, "
                "together with a delta that fits"
            )

    def check_updates(self, num_updates: int) -> None:
        if self.delta == "auto" and num_updates < 3:
            raise UserError(
                "loss.delta=auto needs batch.updates_per_iteration times batch.inner_epochs above "
                "2: an iteration's first update is never masked, so it alone makes the second "
                "one's KL"
            )

    def __call__(self, inputs: LossInputs) -> LossOutput:
        # Once more, for whoever calls the loss without a method that was checked.
        self._check_likelihood(inputs.form, inputs.reduction)
        losses, metrics = masked_surrogate(
            inputs.advantage,
            log_ratio=inputs.log_ratio,
            is_far=self._distance(inputs) >= self._limit(inputs),
            advantage_clip=self.advantage_clip,
        )
        metrics["trust/delta"] = losses.new_full((), self.threshold)
        return LossOutput(losses.mean(), metrics)

    def _distance(self, inputs: LossInputs) -> Float[Tensor, "B"]:
        distances = {"kl": inputs.kl, "tv": inputs.tv, "velocity": inputs.velocity_change}
        return distances[self.divergence]

    def _limit(self, inputs: LossInputs) -> float:
        """Return the threshold of a step, above the KL that its rounding alone gives."""
        if self.divergence != "kl":
            return self.threshold
        return self.threshold + inputs.kl_floor

    @property
    def kl_threshold(self) -> float | None:
        return self.threshold if self.divergence == "kl" else None

    def begin(self, progress: float) -> None:
        """Set the threshold of an iteration, where it follows a schedule."""
        if self.final_delta is not None:
            start = float(self.delta)
            self.threshold = start * (self.final_delta / start) ** progress

    def observe(self, metrics: Mapping[str, float], num_updates: int) -> None:
        """Adapt a threshold that holds a budget to the mean KL of an iteration's terms.

        The first update starts at the rollout's weights, where the KL is 0, so the mean is taken
        over the others.
        """
        if self.delta != "auto" or self.kl_budget is None or num_updates < 2:
            return
        # The root damps the steps, since the KL answers to a threshold only an iteration later.
        mean_kl = metrics["trust/kl_old"] * num_updates / (num_updates - 1)
        if mean_kl > 0:
            wanted = self.threshold * math.sqrt(self.kl_budget / mean_kl)
            lowest = self.kl_budget / BUDGET_RANGE
            self.threshold = min(max(wanted, lowest), self.kl_budget * BUDGET_RANGE)

    def state(self) -> dict[str, float]:
        """Return a threshold that holds a budget, since it follows from all iterations so far."""
        return {"delta": self.threshold} if self.delta == "auto" else {}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Take a threshold back; unless both runs hold a budget, the new run's own one stands."""
        if self.delta == "auto" and "delta" in state:
            self.threshold = state["delta"]
