"""The rounding floor of the KL: what moved weights give per step where the move itself is too small
to count.

Replaying a rollout under its own weights gives a KL of exactly 0 whatever the dtype, so the gate
cannot see how coarse the network computes. Under other weights every operator may round another
way, and in bfloat16 that alone gives divergences as large as published thresholds.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import TYPE_CHECKING

import torch

from flowrl.parallel.collectives import gather
from flowrl.rollout import replay
from flowrl.training.metric_means import Record
from flowrl.training.prompt_data import PromptBatch
from flowrl.tuning.weights import swapped

if TYPE_CHECKING:
    from flowrl.training.policy import Policy

MOVE = 1e-6
"""The number that is added to every trained weight: far below an optimizer step, and above the
rounding of float32 weights that are smaller than 8.
"""
WARNED_SHARE = 1 / 3
"""The share of a mask's threshold above which a floor is warned of."""

log = logging.getLogger(__name__)


def take_floor(policy: Policy, batch: PromptBatch, record: Record) -> None:
    """Measure the floor before a run's first update, record it, and warn where it is as large as
    the mask's threshold.

    A resumed run has the floor that its checkpoint brought, and measures nothing.
    """
    if policy.kl_floor is None:
        policy.kl_floor = measure_floor(policy, batch)
        for number, floor in policy.kl_floor.items():
            record.add(f"trust/kl_floor/{number}", floor)
        _warn(policy, policy.kl_floor)
    if policy.is_above_floor:
        policy.objective.allow(policy.kl_floor)


def measure_floor(policy: Policy, batch: PromptBatch, move: float = MOVE) -> dict[int, float]:
    """Measure the mean KL between a step and its replay under weights moved by `move`, by the
    step's number: for all steps that the method may train on.

    One rollout of a process's first micro-batch, with all of these steps stochastic, and one replay
    of each; the mean over processes, which all must take part. The KL is that of the configured
    reduction. Weights are the same bitwise afterwards, and no random state is touched.
    """
    steps = policy.objective.replayed_steps()
    if not steps:
        return {}
    rows = policy.plan.updates(policy.global_rank)[0][0]
    conditioned, trajectory = policy.draw(batch, rows, steps)
    field = conditioned.field(policy.velocity)
    method = policy.algorithm
    parameters = policy.tuning.parameters()
    moved = {name: value.detach() + move for name, value in parameters.items()}
    own: dict[int, float] = {}
    # With autograd, as in an update, where it may pick other kernels.
    with torch.enable_grad(), swapped(parameters, moved):
        for index, number in enumerate(trajectory.steps):
            step = replay(field, trajectory, index, method.intervals, method.sampler)
            kl = method.likelihood.kl(step, trajectory.old_mean[:, index])
            own[number] = kl.detach().mean().item()
    pooled: dict[int, list[float]] = defaultdict(list)
    for of_one_process in gather(own):
        for number, value in of_one_process.items():
            pooled[number].append(value)
    return {number: sum(values) / len(values) for number, values in pooled.items()}


def _warn(policy: Policy, floor: dict[int, float]) -> None:
    """Say in one line, in the first process, that rounding decides what the mask drops."""
    threshold = policy.objective.kl_threshold
    if not floor or threshold is None or policy.is_above_floor or policy.global_rank > 0:
        return
    number = max(floor, key=floor.__getitem__)
    if floor[number] > WARNED_SHARE * threshold:
        log.warning(
            "weights moved by %g alone give a KL of %.1e at step %d, above a third of the mask's "
            "threshold %g: rounding decides what is dropped; set trust.above_floor=true, which "
            "adds each step's floor to the threshold, or compute in float32",
            MOVE,
            floor[number],
            number,
            threshold,
        )
