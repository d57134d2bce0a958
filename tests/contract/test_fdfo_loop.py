"""FDFO in the training loop: pairs of a prompt, whatever the micro-batches."""

from contextlib import nullcontext
from typing import ClassVar

import pytest
import torch
from runs import SMALL, awake, make, put

from flowrl.errors import UserError
from flowrl.losses.fdfo import FDFO
from flowrl.training import optimization
from flowrl.training.metric_means import Record
from flowrl.training.sampling import sample_update

PAIRS = (*SMALL, "loss=fdfo", "sampler=cps", "steps=all_but_last", "batch.group_size=4")


class Watched(FDFO):
    """FDFO that keeps what it is shown."""

    seen: ClassVar[list] = []

    def __call__(self, inputs):
        self.seen.append(inputs)
        return super().__call__(inputs)


def shown(monkeypatch, *overrides):
    """What the loss is shown at the first step of every micro-batch, together, after the weights
    moved, and the parts of the update.
    """
    monkeypatch.setattr(optimization, "synchronised", lambda *arguments, **options: nullcontext())
    monkeypatch.setattr(optimization, "averages_gradients", lambda policy: False)
    policy, data, _ = make(*PAIRS, *overrides)
    put(policy, loss=Watched(clip=0.1, advantage_clip=5.0))
    policy.manual_backward = lambda loss: None
    parts = sample_update(policy, next(iter(data.iterations)), 0, policy.plan.updates(0)[0])
    for part in parts:
        part.advantage = torch.arange(len(part.rows)) + 10.0 * part.rows[0]
    with torch.no_grad():
        for weight in awake(policy).tuning.parameters().values():
            weight.add_(0.01)
    Watched.seen.clear()
    optimization.accumulate_gradients(policy, parts, Record())
    num_steps = len(parts[0].trajectory.steps)
    firsts = Watched.seen[::num_steps]
    log_ratio = torch.cat([inputs.pair_log_ratio for inputs in firsts]).detach()
    return log_ratio, torch.cat([inputs.advantage for inputs in firsts]), parts


def test_pairs_are_those_of_a_prompt(monkeypatch):
    """Advantages 0, 1, 2, 3, ... of neighbours are half of 1 apart, and in micro-batches of one
    group or of two the ratios are the same.

    Mutation: pair samples across prompts, or a sample with the micro-batch's mean.
    """
    one, advantage, parts = shown(monkeypatch)
    assert len(parts) > 1
    assert advantage.tolist() == [-0.5, 0.5] * (len(advantage) // 2)
    both, _, whole = shown(monkeypatch, "batch.max_micro_batch=8")
    assert len(whole) < len(parts)
    torch.testing.assert_close(one, both, rtol=1e-3, atol=1e-5)
    assert one.abs().min() > 0


def test_a_group_of_an_odd_number_is_refused():
    """Before any weight is read. Mutation: leave the check to the first update."""
    with pytest.raises(UserError, match=r"batch.group_size=3: loss=fdfo compares pairs"):
        make("loss=fdfo", "sampler=cps", "batch.group_size=3")
