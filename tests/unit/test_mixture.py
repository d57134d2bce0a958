import math

import pytest
import torch

from flowrl.rewards.mixture import Mixture
from flowrl.rewards.protocol import only_computes
from flowrl.training.reward import RewardModule
from flowrl.types import Prompt, RewardOutput

PROMPTS = [Prompt("a"), Prompt("b")]
IMAGES = torch.zeros(2, 3, 4, 4)


def fixed(values, is_valid=(True, True)):
    return lambda images, prompts: RewardOutput(
        torch.tensor(values), torch.tensor(is_valid), {"part": torch.tensor(values) + 1}
    )


def test_weighted_sum_with_its_terms():
    """2 x (1, 2) + (10, 20). Mutation: average instead, or mix the weights up."""
    mixture = Mixture(
        rewards={"x": fixed([1.0, 2.0]), "y": fixed([10.0, 20.0])}, weights={"y": 1.0, "x": 2.0}
    )
    output = mixture(IMAGES, PROMPTS)
    assert output.values.tolist() == [12, 24]
    assert output.terms.tolist() == [[1, 10], [2, 20]] and output.weights == (2.0, 1.0)
    assert {name: part.tolist() for name, part in output.parts.items()} == {
        "x": [1, 2],
        "y": [10, 20],
        "x_part": [2, 3],
        "y_part": [11, 21],
    }


def test_a_sample_that_one_reward_misses_is_missing():
    """Mutation: any instead of all."""
    mixture = Mixture(
        rewards={"x": fixed([1.0, 2.0], (True, False)), "y": fixed([0.0, 0.0])},
        weights={"x": 1, "y": 1},
    )
    assert mixture(IMAGES, PROMPTS).is_valid.tolist() == [True, False]


@pytest.mark.parametrize("weights", [{}, {"x": 1.0, "z": 1.0}])
def test_weights_must_name_the_rewards(weights):
    """Mutation: take missing weights as 1."""
    with pytest.raises(ValueError, match=r"reward.weights"):
        Mixture(rewards={"x": fixed([1.0, 2.0])}, weights=weights)


def test_a_monitoring_reward_can_never_stop_a_run():
    """Weight 0: no term, and its failure or its missing samples change nothing. Mutation: treat it
    like the others.
    """

    def broken(images, prompts):
        raise ConnectionError("no answer")

    rewards = {
        "x": fixed([1.0, 2.0]),
        "y": broken,
        "z": fixed([5.0, 6.0], (False, True)),
        "short": fixed([1.0], [True]),
    }
    weights = {"x": 2.0, "y": 0.0, "z": 0.0, "short": 0.0}
    output = RewardModule(reward=Mixture(rewards=rewards, weights=weights), max_missing=0.0).score(
        IMAGES, PROMPTS
    )
    assert (
        output.values.tolist() == [2, 4] and output.is_valid.all() and output.terms.shape == (2, 1)
    )
    assert "y" not in output.parts and output.parts["z"][0].isnan() and output.parts["z"][1] == 6
    assert "short" not in output.parts


def test_a_failing_mixture_keeps_its_shape():
    """Terms and weights of the reward, all missing. Mutation: a single term, which other processes
    cannot gather.
    """

    def broken(images, prompts):
        raise ConnectionError("no answer")

    mixture = Mixture(rewards={"x": broken, "y": fixed([0.0, 0.0])}, weights={"x": 1.0, "y": 3.0})
    output = RewardModule(reward=mixture, max_missing=1.0).score(IMAGES, PROMPTS)
    assert (
        output.terms.shape == (2, 2) and output.weights == (1.0, 3.0) and not output.is_valid.any()
    )


def only(row, value):
    """A reward that applies to one prompt, and says `value` of it."""
    applies = torch.tensor([i == row for i in range(2)])
    return lambda images, prompts: RewardOutput(
        torch.full((2,), value), ~applies | applies, applies=applies[:, None]
    )


def test_a_reward_that_does_not_apply_is_neither_missing_nor_zero():
    """Mutation: count it as missing, or add its value all the same."""
    mixture = Mixture(
        rewards={"x": fixed([1.0, 2.0]), "y": only(1, 10.0)}, weights={"x": 1.0, "y": 3.0}
    )
    output = RewardModule(reward=mixture, max_missing=0.0).score(IMAGES, PROMPTS)
    assert output.values.tolist() == [1, 32] and output.is_valid.all() and output.has_value.all()
    assert output.terms[0, 1].isnan() and output.terms[1].tolist() == [2, 10]
    assert output.parts["y"][0].isnan() and output.parts["y"][1] == 10


def test_where_nothing_applies_there_is_no_value():
    """Mutation: a value of 0, or a missing sample."""
    mixture = Mixture(rewards={"x": only(1, 2.0), "y": only(1, 10.0)}, weights={"x": 1.0, "y": 1.0})
    output = RewardModule(reward=mixture, max_missing=0.0).score(IMAGES, PROMPTS)
    assert output.values[0].isnan() and output.values[1] == 12
    assert output.is_valid.all() and output.has_value.tolist() == [False, True]


def test_a_mixture_only_computes_where_all_its_rewards_do():
    """One that waits for a server would hold up the rollout. Mutation: where any does."""

    class Scorer:
        def __init__(self, only_computes):
            self.only_computes = only_computes

        def __call__(self, images, prompts):
            raise NotImplementedError

    for answers in ((True, True), (True, False), (False, False)):
        rewards = dict(zip("xy", map(Scorer, answers), strict=True))
        mixture = Mixture(rewards=rewards, weights={"x": 1.0, "y": 0.0})
        assert only_computes(mixture) == all(answers)


def test_scorers_with_weights_are_frozen_and_moved_with_the_mixture():
    """Mutation: keep them in a plain dict."""

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def forward(self, images, prompts):
            return RewardOutput(torch.zeros(2), torch.ones(2, dtype=torch.bool))

    network = Network()
    module = RewardModule(
        reward=Mixture(rewards={"x": network}, weights={"x": 1.0}), max_missing=0.0
    )
    assert not network.layer.weight.requires_grad and not network.training
    assert module.to(torch.float64) and network.layer.weight.dtype == torch.float64


def test_a_missing_sample_says_which_reward_failed_and_why():
    """Mutation: leave the terms' reasons out."""

    def failing(images, prompts):
        return RewardOutput(
            torch.zeros(2),
            torch.tensor([True, False]),
            {},
            [{"atom": True}, {"missing": "no text"}],
        )

    mixture = Mixture(rewards={"x": fixed([1.0, 2.0]), "ocr": failing}, weights={"x": 1, "ocr": 1})
    info = RewardModule(reward=mixture, max_missing=1.0).score(IMAGES, PROMPTS).info
    assert info == [{}, {"missing": "ocr: no text"}]


def test_a_term_that_is_no_number_is_missing_in_a_mixture_of_mixtures():
    """NaN under a valid mark is a failure there too, and monitors' parts of missing samples are no
    numbers.

    Mutation: take NaN for a reward that does not apply, or pass parts of missing samples on.
    """
    inner = Mixture(
        rewards={"x": fixed([math.nan, 2.0]), "y": fixed([1.0, 1.0])}, weights={"x": 1, "y": 1}
    )
    outer = Mixture(
        rewards={"both": inner, "watch": fixed([3.0, 4.0], (False, True))},
        weights={"both": 1, "watch": 0},
    )
    output = outer(IMAGES, PROMPTS)
    assert output.is_valid.tolist() == [False, True]
    assert output.parts["watch_part"].isnan().tolist() == [True, False]
