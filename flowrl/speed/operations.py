"""The floating-point operations of an iteration's networks."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from flowrl.speed.bare_parts import BareParts
from flowrl.training.optimization import velocity_in_updates


def utilisation(operations: float, took: float, speed: float) -> float:
    """Return the share of `speed`, in operations a second, at which so many operations were done in
    `took` seconds.
    """
    return operations / took / speed


@torch.compiler.set_stance("force_eager")  # compiled blocks cannot be counted
def operations_per_row(parts: BareParts) -> dict[str, int]:
    """Count floating-point operations on one sample, of one velocity and of decoding; recomputation
    is left out.
    """
    policy = parts.policy
    transformer: Any = policy.transformer
    x = parts.x[:1]
    one = parts.group.conditioning()[:1]
    transformer.disable_gradient_checkpointing()
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        policy.velocity(x, 0.5, one)
    with FlopCounterMode(display=False) as both:
        velocity = velocity_in_updates(policy, x, 0.5, one)
        velocity.backward(torch.ones_like(velocity))
    with FlopCounterMode(display=False) as old, torch.no_grad():
        velocity_in_updates(policy, x, 0.5, one)
    with FlopCounterMode(display=False) as reference:
        policy.reference.velocity(x, 0.5, one)
    with FlopCounterMode(display=False) as decode:
        policy.model.decode(x)
    if parts.is_checkpointed:
        transformer.enable_gradient_checkpointing()
    for parameter in policy.parameters():
        parameter.grad = None
    counts = {"rollout": forward, "update": both, "reference": reference, "decode": decode}
    cost = {name: count.get_total_flops() for name, count in counts.items()}
    if parts.has_old_policy:
        cost["update"] += old.get_total_flops()
    return cost


def operations_of(parts: BareParts) -> dict[str, float]:
    """Count floating-point operations of each bare part of an iteration that runs a network."""
    trained = parts.trained_steps * parts.policy.plan.inner_epochs
    has_reference = parts.policy.algorithm.needs_reference
    steps = {
        "rollout": parts.rollout_steps,
        "update": trained,
        "reference": trained if has_reference else [],
    }
    num_rows = {}
    for name, pairs in steps.items():
        num_rows[name] = sum(parts.group.num_evaluated(is_shared) for _, is_shared in pairs)
    num_rows["decode"] = len(parts.x)
    cost = operations_per_row(parts)
    return {name: float(parts.num_micro_batches * cost[name] * num_rows[name]) for name in cost}
