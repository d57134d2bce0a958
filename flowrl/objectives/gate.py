"""The start-up gate: a replay of a fresh rollout under unchanged weights must reproduce it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch

from flowrl.gaussian import GaussianStep, Likelihood
from flowrl.types import Trajectory


class GateFailed(RuntimeError):
    """Replaying a fresh rollout with unchanged weights did not reproduce its steps.

    `drift` is the larger of the largest log-ratio and the largest divergence of the step at fault.
    """

    def __init__(self, text: str, drift: float) -> None:
        super().__init__(text)
        self.drift = drift


def check_replay(
    trajectory: Trajectory,
    replay: Callable[[int], GaussianStep],
    likelihood: Likelihood,
    tolerance: float,
) -> None:
    """Raise GateFailed where a step's log-ratio or divergence is not 0 within `tolerance`.

    `replay` gives the Gaussian of the trajectory's i-th step, evaluated as an update
    would.
    """
    # As in an update, where autograd may pick other kernels.
    with torch.enable_grad():
        for index, number in enumerate(trajectory.steps):
            step = replay(index)
            old_mean = trajectory.at("old_mean", index)
            log_ratio = likelihood.log_ratio(step, old_mean, trajectory.at("x_next", index))
            drift = log_ratio.abs().max().item()
            divergence = likelihood.kl(step, old_mean).max().item()
            # Written with `not`, so that NaN does not pass.
            if not (drift <= tolerance and divergence <= tolerance):
                raise GateFailed(
                    f"step {number}: replaying the rollout moved its log-probability by "
                    f"{drift:.2e} and its mean by a divergence of {divergence:.2e}, above "
                    f"gate_tolerance={tolerance:g}: rollout and update disagree in precision, "
                    "batch shape or mode",
                    max(drift, divergence),
                )


def explain(
    error: GateFailed,
    variants: Iterable[tuple[str, AbstractContextManager[None]]],
    attempt: Callable[[], None],
) -> GateFailed:
    """Return the error with the drift that each of some settings leaves.

    `variants` are settings by their overrides, each with a context in which it holds; `attempt`
    rolls out anew and passes the gate, or raises GateFailed. Settings that this machine or network
    does not have are left out. Raises OutOfMemoryError where the device runs out of memory.
    """
    drifts = []
    for setting, change in variants:
        try:
            with change:
                attempt()
        except GateFailed as other:
            drifts.append(f"{setting} {other.drift:.1e}")
        except torch.OutOfMemoryError:
            raise  # whoever reserved the memory says what to do
        except RuntimeError:  # no such kernel here
            continue
        else:
            drifts.append(f"{setting} none")
    told = f"drift with {', '.join(drifts)}; " if drifts else ""
    return GateFailed(
        f"{error}; {told}choose what leaves none, set backend.compile=false where blocks are "
        "compiled, or raise gate_tolerance, to a tenth of the threshold at most",
        error.drift,
    )
