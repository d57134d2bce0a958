"""Flow-DPPO: the divergence mask, a trust region that decides by the exact divergence of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from flowrl.errors import UserError
from flowrl.losses.clip import require_gaussian, require_positive
from flowrl.types import LossInputs, LossOutput
from flowrl.values.bounds import Limit, Positive, Threshold


@dataclass(kw_only=True)
class DPPO:
    """`dppo` with a threshold that is fixed, follows a schedule, or holds a KL budget.

    `delta` a number: fixed, or with `final_delta` the start of a geometric schedule over the run
    towards it. `delta` "auto": starts at `kl_budget` and after each iteration is multiplied by
    (kl_budget / mean KL)^(1/2), within a factor of 100 of the budget, so that the mean KL(old ||
    current) of the iterations' terms settles at the budget where the mask can hold it there. It
    needs more than two updates an iteration: the first, where the KL is 0, is never masked and
    alone makes the second one's KL. Our own addition; the paper's threshold is fixed.
    """

    delta: Threshold | Literal["auto"]
    final_delta: Positive | None
    kl_budget: Positive | None
    divergence: Literal["kl", "tv", "velocity"]
    calibrated_for: Literal["kl", "sum_kl", "tv", "velocity"]
    advantage_clip: Limit

    def __post_init__(self) -> None:
        require_positive(advantage_clip=self.advantage_clip)
        if self.divergence not in ("kl", "tv", "velocity"):
            raise UserError(f"loss.divergence={self.divergence!r} must be kl, tv or velocity")
        if self.delta == "auto":
            if (
                not self.kl_budget
                or self.kl_budget < 0
                or self.divergence != "kl"
                or self.final_delta is not None
            ):
                raise UserError(
                    f"loss.delta=auto needs a positive loss.kl_budget (not {self.kl_budget}), "
                    "loss.divergence=kl and "
                    "no loss.final_delta"
                )
        elif isinstance(self.delta, str) or not self.delta >= 0:
            raise UserError(
                f"loss.delta={self.delta!r} must be auto or a number that is not negative"
            )
        elif self.kl_budget is not None:
            raise UserError(
                f"loss.kl_budget={self.kl_budget} is only for loss.delta=auto, not {self.delta}"
            )
        elif self.final_delta is not None and not min(self.delta, self.final_delta) > 0:
            raise UserError(
                f"loss.final_delta={self.final_delta} and loss.delta={self.delta} must both be "
                "positive"
            )
        self.current = float(self.kl_budget or 0.0) if self.delta == "auto" else float(self.delta)

    def begin(self, progress: float) -> None:
        """Set the threshold of an iteration from the share of the run that is done, where it
        follows a schedule.
        """
        if self.final_delta is not None:
            self.current = float(self.delta) * (self.final_delta / float(self.delta)) ** progress

    def observe(self, mean_kl: float) -> None:
        """Take in the mean KL of an iteration's terms; only a threshold that holds a budget
        changes.
        """
        if self.delta == "auto" and self.kl_budget and mean_kl > 0:
            wanted = self.current * math.sqrt(self.kl_budget / mean_kl)
            self.current = min(max(wanted, self.kl_budget / 100), self.kl_budget * 100)

    def __call__(self, inputs: LossInputs) -> LossOutput:
        require_gaussian(inputs, loss="dppo")
        is_sum = self.divergence == "kl" and inputs.reduction == "sum"
        needed = "sum_kl" if is_sum else self.divergence
        if self.calibrated_for != needed:
            raise UserError(
                f"loss.calibrated_for={self.calibrated_for}, but loss.divergence={self.divergence} "
                "with "
                f"likelihood.reduction={inputs.reduction}; set loss.calibrated_for={needed}, "
                "together with a delta "
                "that fits"
            )
        output = dppo(
            inputs,
            delta=self.current,
            divergence=self.divergence,
            advantage_clip=self.advantage_clip,
        )
        return LossOutput(
            output.loss,
            output.metrics | {"trust/delta": output.loss.new_tensor(self.current).detach()},
        )


def dppo(
    inputs: LossInputs,
    *,
    delta: float,
    divergence: Literal["kl", "tv", "velocity"],
    advantage_clip: float,
) -> LossOutput:
    """Mean over samples of -A r where kept and 0 where dropped; dropped terms count in the mean.

    Dropped if D >= delta and (A > 0 and r > 1, or A < 0 and r < 1): the step is already too far and
    the update moves it further. Corrective updates always keep their gradient, and r is never
    clipped.

    Paper: Flow-DPPO (Ping et al. 2026, arXiv 2606.11025), its mask M. D is KL(old || current) under
    the configured reduction (mean in every published threshold: 1e-6 in the authors' recipes, 1e-5
    in UniRL's), or TV, or mean (v - old_v)^2 (`velocity`, Flow-Factory's `v-based`). Differs from
    Flow-Factory's code, which multiplies by the mask: 0 times an overflown ratio is NaN, `where` is
    not.
    """
    advantage = inputs.advantage.clamp(-advantage_clip, advantage_clip)
    log_ratio = inputs.log_prob - inputs.old_log_prob
    with torch.no_grad():
        ratio = log_ratio.exp()
        distance = {"kl": inputs.kl, "tv": inputs.tv, "velocity": inputs.velocity}[divergence]
        is_far = distance >= delta
        positive = is_far & (advantage > 0) & (ratio > 1)
        negative = is_far & (advantage < 0) & (ratio < 1)
        is_dropped = positive | negative
    # Masking before the exponential, too: behind `where` alone an infinite ratio still gives 0
    # times inf backwards.
    surrogate = advantage * torch.where(is_dropped | (advantage == 0), 0.0, log_ratio).exp()
    loss = torch.where(is_dropped, 0.0, -surrogate).mean()
    metrics = {
        "trust/masked_fraction": is_dropped.float().mean(),
        "trust/masked_positive": positive.float().mean(),
        "trust/masked_negative": negative.float().mean(),
    }
    return LossOutput(loss, metrics)
