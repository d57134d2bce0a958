"""Metrics of a policy on their way to trackers and to the run's record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from flowrl.runs import glossary

if TYPE_CHECKING:
    from flowrl.training.policy import Policy


def report_iteration(policy: Policy, values: Mapping[str, float]) -> None:
    """Log one iteration's metrics, and keep them in `last_metrics` for the run's own record.

    Raises KeyError for a metric that neither the glossary nor the loss defines.
    """
    glossary.check(values, policy.algorithm.loss.metrics)
    num_samples = policy.num_iterations * policy.scouting.num_drawn
    counters = {"iteration": policy.num_iterations, "samples": num_samples}
    policy.last_metrics = {**counters, **values}
    _log_to_trackers(policy, policy.last_metrics)


def report_evaluation(policy: Policy, values: Mapping[str, float]) -> None:
    """Log an evaluation's metrics against the same axis. Raises KeyError for an undefined one."""
    glossary.check(values)
    _log_to_trackers(policy, {"iteration": policy.num_iterations, **values})


def _log_to_trackers(policy: Policy, values: Mapping[str, float]) -> None:
    """Log to every tracker, against the number of iterations, which goes on in a resumed run."""
    numbers = {name: float(value) for name, value in values.items()}
    for logger in policy.loggers:
        logger.log_metrics(numbers, step=policy.num_iterations)
