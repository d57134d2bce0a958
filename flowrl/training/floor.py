"""The rounding floor of the KL: what moved weights give per step where the move itself is too small
to count.

Replaying a rollout under its own weights gives a KL of exactly 0 whatever the dtype, so the gate
cannot see how coarse the network computes. Under other weights every operator may round another
way, and in bfloat16 that alone gives divergences as large as published thresholds.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from flowrl.parallel.collectives import gather
from flowrl.rollout import replay
from flowrl.training.metric_means import Record
from flowrl.training.prompt_data import PromptBatch
from flowrl.training.sampling import draw
from flowrl.tuning.weights import swapped

if TYPE_CHECKING:
    from flowrl.training.policy import Policy

MOVE = 1e-5
"""The number that is added to every trained weight: below an optimizer step, far above the
rounding of float32 weights that are smaller than 8.
"""
WARNED_SHARE = 1 / 3
"""The share of a mask's threshold above which a floor is warned of."""

log = logging.getLogger(__name__)


class Floor:
    """The floor of a run, by the step's number, once it is measured; with `is_added` the mask's
    threshold at a step is raised by it.
    """

    def __init__(self, *, is_added: bool) -> None:
        self.is_added = is_added
        self.values: dict[int, float] | None = None

    def take(self, policy: Policy, batch: PromptBatch, record: Record) -> None:
        """Measure the floor before a run's first update, record it, and warn where it is more
        than `WARNED_SHARE` of the mask's threshold.

        A resumed run has the floor that its checkpoint brought, and measures nothing.
        """
        if self.values is None:
            self.values = measure_floor(policy, batch)
            for number, floor in self.values.items():
                record.add(f"trust/kl_floor/{number}", floor)
            if not self.is_added:
                _warn(policy, self.values)
        if self.is_added:
            policy.objective.allow(self.values)

    def state(self) -> dict[str, float] | None:
        """Return what a checkpoint needs: the floor by its steps as JSON's texts; None before it is
        measured.
        """
        if self.values is None:
            return None
        return {str(number): kl for number, kl in self.values.items()}

    def load_state(self, state: Mapping[str, float] | None) -> None:
        """Take back what `state` gave."""
        self.values = None if state is None else {int(step): kl for step, kl in state.items()}


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
    conditioned, trajectory = draw(policy, batch, rows, steps)
    field = conditioned.field(policy.velocity)
    method = policy.algorithm
    parameters = policy.tuning.parameters()
    moved = {name: value.detach() + move for name, value in parameters.items()}
    own: dict[int, float] = {}
    # With autograd, as in an update, where it may pick other kernels.
    with torch.enable_grad(), swapped(parameters, moved):
        for index, number in enumerate(trajectory.steps):
            step = replay(field, trajectory, index, method.intervals, method.sampler)
            kl = method.likelihood.kl(step, trajectory.at("old_mean", index))
            own[number] = kl.detach().mean().item()
    pooled: dict[int, list[float]] = defaultdict(list)
    for of_one_process in gather(own):
        for number, value in of_one_process.items():
            pooled[number].append(value)
    return {number: sum(values) / len(values) for number, values in pooled.items()}


def _warn(policy: Policy, floor: dict[int, float]) -> None:
    """Say in one line, in the first process, that rounding decides what the mask drops."""
    threshold = policy.objective.kl_threshold
    if not floor or threshold is None or policy.global_rank > 0:
        return
    number = max(floor, key=floor.__getitem__)
    if floor[number] > WARNED_SHARE * threshold:
        log.warning(
            "weights moved by %g alone give a KL of %.1e at step %d, above %.0f %% of the mask's "
            "threshold %g: rounding decides what is dropped; set trust.above_floor=true, which "
            "adds each step's floor to the threshold, or compute in float32",
            MOVE,
            floor[number],
            number,
            100 * WARNED_SHARE,
            threshold,
        )
