"""A loss that looks back sees the KLs of the same update's earlier steps."""

from contextlib import nullcontext
from typing import ClassVar

import pytest
import torch
from runs import SMALL, awake, make, put

from flowrl.errors import UserError
from flowrl.losses.cppo import CPPO
from flowrl.objectives import check_method
from flowrl.samplers.steps import AllButLast
from flowrl.samplers.trained import RandomShare
from flowrl.training import optimization
from flowrl.training.metric_means import Record
from flowrl.training.sampling import sample_update


class Watched(CPPO):
    """CPPO that keeps what it is shown."""

    seen: ClassVar[list] = []

    def __call__(self, inputs):
        self.seen.append(inputs)
        return super().__call__(inputs)


def test_earlier_kls_are_those_of_the_update(monkeypatch):
    """Two updates under different weights, in micro-batches. Mutation: keep the KLs of an earlier
    update, of another micro-batch, or leave a step out.
    """
    monkeypatch.setattr(optimization, "synchronised", lambda *arguments, **options: nullcontext())
    monkeypatch.setattr(optimization, "averages_gradients", lambda policy: False)
    policy, data, _ = make(*SMALL, "loss=cppo", "steps=all_but_last", "batch.group_size=4")
    options = {
        name: getattr(policy.algorithm.loss, name)
        for name in ("delta", "budget_share", "last_weight", "calibrated_for", "advantage_clip")
    }
    put(policy, loss=Watched(**options))
    policy.manual_backward = lambda loss: None
    parts = sample_update(policy, next(iter(data.iterations)), 0, policy.plan.updates(0)[0])
    assert len(parts) > 1
    for moved in (awake(policy), policy):
        with torch.no_grad():
            for weight in moved.tuning.parameters().values():
                weight.add_(0.01)
        Watched.seen.clear()
        optimization.accumulate_gradients(policy, parts, Record())
        num_steps = len(parts[0].trajectory.steps)
        assert len(Watched.seen) == num_steps * len(parts)
        for start in range(0, len(Watched.seen), num_steps):
            terms = Watched.seen[start : start + num_steps]
            for index, inputs in enumerate(terms):
                assert inputs.num_steps == num_steps
                assert inputs.earlier_kl.shape == (len(inputs.kl), index)
                for place in range(index):
                    assert torch.equal(inputs.earlier_kl[:, place], terms[place].kl.detach())
                    assert terms[place].kl.min() > 0


def test_samples_must_train_on_all_stochastic_steps():
    """Mutation: look back over steps of which a sample trains on a share."""
    policy, _, _ = make(*SMALL, "loss=cppo")
    put(policy, steps=AllButLast(), trained=RandomShare(share=0.5))
    with pytest.raises(UserError, match=r"loss=cppo looks back .*choose trained=all"):
        check_method(policy.algorithm)
