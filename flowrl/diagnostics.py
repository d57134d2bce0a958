"""Exact divergences tell about an update how noisy the ratio is, where clipping errs, and what the
bound promises.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flowrl.losses.ratio import moves_down, moves_up
from flowrl.types import LossInputs
from flowrl.values.bounds import ClipHigh, Threshold
from flowrl.values.check import check_fields

SQUARED = "_squared"
"""Ends the name of a mean square, whose root is taken over all samples of a step and update,
whatever the batches.
"""
LARGEST_LOG_RATIO = 60.0
"""Above it the bound's ratio is cut off, so that sums of it stay finite in float32, which ends at
exp(88).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnostics:
    """Compares ratio clipping at `clip` with the divergence mask at `delta`, whichever of them
    trains.

    With d = mean - old_mean the log-ratio is a noise part of standard deviation |d| / std over the
    signal -|d|^2 / (2 std^2), which is minus the KL (algorithm page of Flow-DPPO, arXiv
    2606.11025): a clip decides by the first, the mask by the second.
    """

    clip: ClipHigh
    delta: Threshold

    def __post_init__(self) -> None:
        check_fields(self, "algorithm.diagnostics")

    @torch.no_grad()
    def __call__(
        self, inputs: LossInputs, step_number: int, *, delta: float | None = None
    ) -> dict[str, Float[Tensor, ""]]:
        """Return the metrics of one step, the grid's `step_number`-th; `delta` stands in place of
        the configured one, where a loss has its own.
        """
        log_ratio = inputs.log_ratio
        # r - 1; near r = 1 `expm1` keeps the digits that a difference loses.
        change = log_ratio.expm1()
        advantage = inputs.advantage
        moves_away = moves_up(advantage, log_ratio=log_ratio) | moves_down(
            advantage, log_ratio=log_ratio
        )
        is_clipped = moves_away & (change.abs() > self.clip)
        is_far = moves_away & (inputs.kl >= (self.delta if delta is None else delta))
        # r - 1 of the full Gaussian.
        excess = full_log_ratio(inputs).clamp(max=LARGEST_LOG_RATIO).expm1()
        mean_kl = inputs.kl.mean()
        mean_tv = inputs.tv.mean()
        metrics = {
            "trust/clip_false_alarms": (is_clipped & ~is_far).float().mean(),
            "trust/clip_misses": (is_far & ~is_clipped).float().mean(),
            "trust/kl_old": mean_kl,
            "trust/kl_old_max": inputs.kl.max(),
            "trust/tv_old": mean_tv,
            "trust/tv_old_max": inputs.tv.max(),
            f"trust/kl_old/{step_number}": mean_kl,
            f"trust/tv_old/{step_number}": mean_tv,
            f"trust/ratio_std{SQUARED}": change.square().mean(),
            "bound/surrogate": (advantage * excess).mean(),
        }
        if inputs.form == "gaussian":
            # The log-ratio is noise minus the KL, so adding the KL leaves the noise.
            metrics[f"trust/log_ratio_noise{SQUARED}"] = (log_ratio + inputs.kl).square().mean()
        return metrics


def full_log_ratio(inputs: LossInputs) -> Float[Tensor, "B"]:
    """Return log N(x_next; mean, std^2 I) - log N(x_next; old_mean, std^2 I), summed over
    dimensions, in whichever form and reduction the log-probabilities were taken.
    """
    log_ratio = inputs.log_ratio
    if inputs.reduction == "mean":
        log_ratio = log_ratio * inputs.dimensions
    # The unnormalised form lacks the Gaussian's 1 / (2 std^2).
    return log_ratio if inputs.form == "gaussian" else log_ratio / (2 * inputs.std**2)


def bound(metrics: Mapping[str, float], num_stochastic: int) -> dict[str, float]:
    """Return both sides of the policy-improvement bound of an iteration, from its metrics; nothing
    without divergences.

    Flow-DPPO (arXiv 2606.11025): J(new) - J(old) >= surrogate - 2 xi (K - 1)(K - 2) (max TV)^2,
    with xi the largest absolute return. Of its K sampling steps K - 1 are stochastic, so with n =
    `num_stochastic` the factor is n (n - 1), and the surrogate is the sum over steps of the mean A
    (r - 1). Returns are advantages here, on both sides, and r and TV are those of the full
    Gaussian, whatever the likelihood's reduction and form.
    """
    if "trust/tv_old_max" not in metrics:
        return {}
    penalty = (
        2
        * metrics["advantage/largest"]
        * num_stochastic
        * (num_stochastic - 1)
        * metrics["trust/tv_old_max"] ** 2
    )
    return {
        # It comes in as a mean over steps, and leaves as the bound's sum over them.
        "bound/surrogate": metrics["bound/surrogate"] * num_stochastic,
        "bound/penalty": penalty,
    }
