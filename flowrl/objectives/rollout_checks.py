"""Checks that objectives share whose rollouts are deterministic and have no steps to train on."""

from __future__ import annotations

from flowrl.algorithm import Algorithm
from flowrl.errors import UserError


def check_no_steps(algorithm: Algorithm) -> None:
    """Raise UserError, in one line, where penalty, initial noise or credit want stochastic steps:
    a penalty of means, one start for a group, which nothing would tell apart, and advantages of
    steps.
    """
    name = algorithm.loss.name
    if algorithm.penalty.beta and algorithm.penalty.form != "velocity":
        raise UserError(
            f"loss={name} has no steps to compare means of, but "
            f"penalty.form={algorithm.penalty.form}: choose penalty=velocity or penalty=none"
        )
    if algorithm.shared_initial_noise:
        raise UserError(
            f"loss={name} draws equal samples in each group with "
            "rollout.shared_initial_noise=true: set it to false"
        )
    if algorithm.credit == "step":
        raise UserError(
            f"loss={name} has no stochastic steps that could have an advantage of their "
            "own: set rollout.credit=trajectory"
        )
