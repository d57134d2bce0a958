"""The operations behind an image that is trained on: drawing, decoding, updates and candidates."""

from __future__ import annotations

from typing import Any

from flowrl.cli.plan_costs import Work
from flowrl.models.meta_memory import flops_of
from flowrl.objectives import num_trained
from flowrl.training.credit import completed_steps


def count_work(plan: Any, is_checkpointed: bool | None) -> Work:
    """Count the operations behind one image of an iteration, with gradient checkpointing or
    without; None is as configured. Completions of steps and candidates are counted with it.
    """
    term = plan.operations_of_term(is_checkpointed)
    network, decode = plan.operations
    if plan.method.loss.needs_old:
        term += of_old_policy(plan)
    num_terms = plan.plan.inner_epochs * count_terms(plan)
    stages = completed_steps(plan.method, plan.stochastic)
    num_evaluations = plan.method.num_steps + sum(stages)
    num_images = 1 + len(stages)
    return Work(num_evaluations * network, num_images * decode, num_terms * term, scouted(plan))


def of_old_policy(plan: Any) -> int:
    """Count the operations of one row's pass of the old policy in an update."""
    arguments = (plan.noise(1), plan.conditioning(1), plan.method.scale_of_updates, 0)
    return flops_of(lambda: plan.look(*arguments))


def count_terms(plan: Any) -> int:
    """Count an update's terms that a sample passes through in each inner epoch: the sigmas or ways
    to the data that it trains on, or every step that some row of its micro-batch trains on.
    """
    if plan.method.loss.kind != "reverse":
        return num_trained(plan.method, seed=plan.cfg.seed)
    return plan.num_kept


def scouted(plan: Any) -> int:
    """Count the operations of the candidates that are drawn for one image that is trained on."""
    if plan.scouting is None:
        return 0
    network, decode = plan.operations
    of_candidate = plan.scouting.num_steps * network + decode
    return plan.scouting.candidates * of_candidate // plan.plan.group_size
