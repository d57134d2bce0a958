"""One update: the gradient of the mean loss over its samples and terms, clipped, and a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Adam, AdamW, Optimizer

from flowrl.errors import NotFinite
from flowrl.models.experts import networks_of
from flowrl.objectives.micro_batch import MicroBatch
from flowrl.parallel.sharding import is_divided
from flowrl.parallel.strategies import averages_gradients, clip, synchronised
from flowrl.training.metric_means import Record
from flowrl.types import Conditioning

if TYPE_CHECKING:
    from flowrl.training.policy import Policy


def at_once(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer; of Adam's and AdamW's a step takes all weights in one call (PyTorch's
    `foreach`), unless it was told how.

    PyTorch chooses that by itself on a GPU. On a CPU it halves a step's time over the many small
    weights of a LoRA, and changes no number; Adam's other kin would round otherwise. Divided
    weights are left alone: a step would hold a temporary of all of them.
    """
    groups = optimizer.param_groups
    is_divided = any(isinstance(weight, DTensor) for group in groups for weight in group["params"])
    if type(optimizer) in (Adam, AdamW) and not is_divided:
        for group in groups:
            if group["foreach"] is None and not group["fused"]:
                group["foreach"] = True
    return optimizer


def set_learning_rate(policy: Policy, progress: float, record: Record) -> None:
    """Give the optimizer its own rates times the schedule's factor at `progress`, in [0, 1)."""
    optimizer = _optimizer(policy)
    for group, rate in zip(optimizer.param_groups, policy.rates, strict=True):
        group["lr"] = rate * policy.rate_factor(progress)
    record.add("update/learning_rate", optimizer.param_groups[0]["lr"])


def step_weights(policy: Policy, update: Sequence[MicroBatch], record: Record) -> None:
    """Make one optimizer step on the mean loss over the update's samples and trained terms.

    The optimizer must have an `eps`, as Adam and its kin do. Raises NotFinite for a gradient that
    holds NaN or infinity, before any weight changes.
    """
    optimizer = _optimizer(policy)
    optimizer.zero_grad()
    accumulate_gradients(policy, update, record)
    weights = policy.tuning.parameters()
    parameters = list(weights.values())
    norm = clip(parameters, policy.max_grad_norm)
    # The norm is that before clipping, and NaN or infinite as soon as one gradient is.
    if not norm.isfinite():
        raise NotFinite(
            f"gradient norm {float(norm)} before optimizer step {policy.num_optimizer_steps + 1}: "
            "stopped"
        )
    record.add("update/grad_norm", norm)
    # Adam divides by the root mean square plus eps: where this is near 1 or below, eps decides the
    # size of steps, and the learning rate no longer does.
    num_weights = sum(parameter.numel() for parameter in parameters)
    root_mean_square = norm / num_weights**0.5
    record.add("update/grad_rms_over_eps", root_mean_square / optimizer.param_groups[0]["eps"])
    with policy.learning.watch(parameters, norm):
        optimizer.step()
    policy.num_optimizer_steps += 1
    policy.ema.update(weights, policy.num_optimizer_steps)


def velocity_in_updates(
    policy: Policy, x: Float[Tensor, "B *X"], sigma: float, conditioning: Conditioning
) -> Float[Tensor, "B *X"]:
    """Evaluate the current policy's velocity, at the guidance scale of updates."""
    return policy.model.velocity(x, sigma, conditioning, policy.algorithm.scale_of_updates)


def accumulate_gradients(policy: Policy, update: Sequence[MicroBatch], record: Record) -> None:
    """Run the backward pass of every term; gradients of several processes meet at the last."""
    objective = policy.objective
    if policy.regularizer is not None:
        policy.regularizer.add_gradients(policy, record)
    num_samples = sum(len(batch.rows) for batch in update)
    terms = _terms(policy, update)
    for number, (batch, index) in enumerate(terms, start=1):
        # A term is a mean over its micro-batch, which counts by its share of the samples.
        divisor = num_samples * objective.num_terms(batch) / len(batch.rows)
        with synchronised(policy, is_last=number == len(terms)):
            output = objective.term(batch, index, policy.num_optimizer_steps)
            # Mean squares of one update and step are pooled over micro-batches before their root.
            term = (policy.num_optimizer_steps, index)
            num_rows = objective.num_rows(batch, index, policy.num_optimizer_steps)
            for name, value in output.metrics.items():
                count = output.counts.get(name, num_rows)
                record.add(name, value, count, term=term)
            loss = output.loss / divisor
            if number == len(terms) and leaves_weights_out(policy):
                loss = loss + _zero_of(policy)
            policy.manual_backward(loss)


def leaves_weights_out(policy: Policy) -> bool:
    """Tell whether an update's last term may leave trained weights without a gradient where they
    must have one: a term asks one of several networks, and processes that average gradients wait
    for each weight's in that term's backward pass.

    With several networks the answer is the same for any number of processes, so that the numbers
    are: an optimizer passes over a weight without a gradient, but not over one of zeros. With a
    single one, weights that no term reaches decay where processes average, and stay in one process;
    the network's outputs do not depend on them.
    """
    return averages_gradients(policy) or len(networks_of(policy.transformer)) > 1


def _zero_of(policy: Policy) -> Tensor:
    """Return a zero that depends on every trained weight."""
    sums = [parameter.sum() for parameter in policy.tuning.parameters().values()]
    return 0 * torch.stack(sums).sum()


def _terms(policy: Policy, update: Sequence[MicroBatch]) -> list[tuple[MicroBatch, int]]:
    """List the terms of an update that need a pass, as micro-batches and numbers, and one at least:
    processes meet at their last one, and a loss may find nothing to train on.
    """
    objective = policy.objective
    # Processes gather divided weights in every pass, so all of them make as many.
    needs_all = is_divided(policy.transformer)
    terms = [(batch, index) for batch in update for index in range(objective.num_terms(batch))]
    step = policy.num_optimizer_steps
    needed = [term for term in terms if needs_all or objective.num_rows(*term, step)]
    return needed or terms[-1:]


def _optimizer(policy: Policy) -> Optimizer:
    return cast(Optimizer, policy.optimizers())
