"""A loss or an advantage of one's own needs its own file alone."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from runs import SMALL, fit, make, put

from flowrl.advantages import group
from flowrl.errors import UserError
from flowrl.losses.protocol import ForwardLoss, ReverseLoss
from flowrl.objectives import check_method
from flowrl.types import LossOutput


@dataclass
class Weighted(ReverseLoss):
    """A private loss with a metric and a state of its own."""

    name = "weighted"
    metrics: ClassVar = {"acme/weight": "What the policy gradient is multiplied by."}

    weight: float = 0.0

    def __call__(self, inputs):
        ratio = inputs.log_ratio.exp()
        loss = -(self.weight * inputs.advantage * ratio).mean()
        return LossOutput(loss, {"acme/weight": torch.tensor(self.weight)})

    def begin(self, progress):
        self.weight = 1.0 + progress

    def observe(self, metrics, num_updates):
        self.weight = 10.0 * num_updates

    def state(self):
        return {"acme_weight": self.weight}

    def load_state(self, state):
        self.weight = state["acme_weight"]


def test_a_private_loss_logs_and_keeps_what_is_its_own():
    """Mutation: check metrics against the glossary alone, or never save or begin a loss."""
    policy, data, _ = make(*SMALL)
    put(policy, loss=Weighted())
    check_method(policy.algorithm)
    fit(policy, data)
    assert policy.last_metrics["acme/weight"] == 1.0
    assert policy.state()["loss"]["acme_weight"] == 10.0 * policy.plan.inner_epochs
    other, _, _ = make(*SMALL)
    put(other, loss=Weighted())
    other.load_state(policy.state())
    assert other.algorithm.loss.weight == policy.algorithm.loss.weight


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({}, "loss=weighted returns the metric 'acme/weight', which it does not define"),
        ({"loss/policy": "x", "acme/weight": "x"}, "defines the metric 'loss/policy' anew"),
        ({"weight": "x", "acme/weight": "x"}, "defines the metric 'weight' anew"),
    ],
)
def test_a_metric_without_a_meaning_is_refused_before_the_first_rollout(
    monkeypatch, metrics, message
):
    """Mutation: look at a loss's metrics once they are logged."""
    policy, _, _ = make(*SMALL)
    put(policy, loss=Weighted())
    monkeypatch.setattr(Weighted, "metrics", metrics)
    with pytest.raises(UserError, match=message):
        check_method(policy.algorithm)


@pytest.mark.parametrize("name", ["loss/policy", "trust/kl_old", "trust/kl_old/3", "reward/mean"])
def test_a_loss_logs_nothing_under_a_name_of_flowrls_own(name):
    """It would be lost, or pooled with what the name means. Mutation: look at the objective's two
    names alone.
    """

    class Greedy(Weighted):
        def __call__(self, inputs):
            output = super().__call__(inputs)
            return LossOutput(output.loss, output.metrics | {name: torch.tensor(9.0)})

    policy, _, _ = make(*SMALL)
    put(policy, loss=Greedy())
    with pytest.raises(UserError, match=f"returns the metric '{name}', which FlowRL logs itself"):
        check_method(policy.algorithm)


def test_an_advantage_may_differ_between_steps():
    """One number a sample and step: each term takes its own column.

    Mutation: train all steps on the first one's, or lose the second axis on the way.
    """
    policy, data, _ = make(*SMALL, "loss=grpo", "loss.clip_low=1", "loss.clip_high=inf")
    num_steps = policy.objective.num_trained()
    assert num_steps > 1

    def by_step(*arguments):
        advantages = group(*arguments)
        steps = torch.arange(num_steps, dtype=torch.float32)
        return replace(advantages, values=advantages.values[:, None] * steps)

    put(policy, advantage=by_step)
    seen = []
    whole = policy.algorithm.loss

    def loss(inputs):
        seen.append(inputs.advantage)
        return whole(inputs)

    policy.objective.loss = Listening(loss)
    fit(policy, data)
    # Micro-batch by micro-batch, each term in its turn.
    for number, advantage in enumerate(seen):
        first = seen[number - number % num_steps + 1]
        assert torch.equal(advantage, first * (number % num_steps))
    assert any(advantage.any() for advantage in seen)


@pytest.mark.parametrize("width", [1, 3])
def test_advantages_of_another_number_of_terms_are_refused(width):
    """Before any update. Mutation: index whatever is there."""
    policy, data, _ = make(*SMALL)
    assert policy.objective.num_trained() not in (1, 3) or width != policy.objective.num_trained()

    def odd(*arguments):
        advantages = group(*arguments)
        return replace(advantages, values=advantages.values[:, None].repeat(1, width))

    put(policy, advantage=odd)
    with pytest.raises(UserError, match=f"advantage gives {width} numbers a sample"):
        fit(policy, data)


class Listening:
    """Stands for a loss in its objective, and lets a function see its inputs."""

    kl_threshold = None
    looks_back = False
    compares = False

    def __init__(self, function):
        self.function = function

    def __call__(self, inputs):
        return self.function(inputs)


@dataclass(kw_only=True)
class Forward(ForwardLoss):
    """A private forward loss with an option, and a state that follows the run."""

    name = "forward"
    metrics: ClassVar = {}

    scale: float = 1.0

    def __call__(self, inputs):
        error = (inputs.velocity - inputs.old_velocity - inputs.x0).square().mean((1, 2, 3))
        return LossOutput(self.scale * (error * inputs.advantage).mean(), {})

    def begin(self, progress):
        self.scale = 2.0

    def state(self):
        return {"scale": self.scale}


def test_a_private_forward_loss_may_hold_state():
    """Mutation: freeze the base class."""
    policy, data, _ = make(*SMALL, "loss=nft", "sampler=ode", "penalty=none")
    options = {"fraction": 0.9, "decay_rate": 0.0, "decay_start": 0, "decay_limit": 0.0}
    put(policy, loss=Forward(**options))
    check_method(policy.algorithm)
    fit(policy, data)
    assert policy.state()["loss"] == {"scale": 2.0}


def test_what_is_no_loss_is_refused_by_name():
    """Mutation: ask for its kind alone."""
    policy, _, _ = make(*SMALL)
    put(policy, loss=len)
    with pytest.raises(UserError, match="is no ReverseLoss, ForwardLoss or DirectLoss"):
        check_method(policy.algorithm)
