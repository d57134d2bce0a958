"""Training's evaluations warn when the reward rises and what was not trained on falls."""

import logging

import pytest
import torch

from flowrl.callbacks.evaluate import Evaluate
from flowrl.callbacks.record import RunRecord
from flowrl.errors import UserError
from flowrl.evaluation.evaluator import Evaluator
from flowrl.samplers.ode import ODE
from flowrl.samplers.sde import FlowSDE
from flowrl.schedule import LinearShift
from flowrl.types import Prompt, RewardOutput


@pytest.fixture
def callback(tmp_path):
    evaluator = Evaluator(
        sets={"own": [Prompt(f"{i} red circles") for i in range(20)]},
        schedule=LinearShift(shift=1.0),
        num_steps=1,
        guidance_scale=1.0,
        max_prompts=None,
        images_per_prompt=2,
        batch_size=2,
        headline="reward",
        solver=ODE(),
        sampler=FlowSDE(noise_level=0.7),
        kl_samples=1,
        seed=0,
    )
    record = RunRecord(folder=str(tmp_path))
    return Evaluate(
        evaluator=evaluator,
        record=record,
        folder=str(tmp_path),
        every=0,
        num_shown=1,
        gold=["clean", "sharp", "x"],
    )


def test_a_gold_part_that_falls_while_the_reward_rises_is_warned_of(callback, caplog):
    """Against the first evaluation, whatever came between; a failed sample counts for nothing, one
    part is no part.

    Mutation: compare with the last evaluation, take a missing sample's value, or warn of a part
    that rose.
    """

    def output(reward, clean, sharp):
        values, is_valid = torch.full((40,), reward), torch.arange(40) != 7
        values[7] = -1e6
        parts = {"clean": torch.full((40,), clean), "sharp": torch.full((40,), sharp)}
        return RewardOutput(values, is_valid, parts)

    with caplog.at_level(logging.WARNING):
        assert (
            callback.alarms(callback.watch(output(0.9, 0.6, 0.7)), []) == []
        )  # with nothing before it
        callback.watched = callback.watch(output(0.5, 0.9, 0.5))
        assert "viewing.gold=x: no part of the reward, whose parts are: clean, sharp" in caplog.text
        assert callback.alarms(callback.watch(output(0.9, 0.6, 0.7)), []) == ["clean"]
        assert callback.alarms(callback.watch(output(0.8, 0.7, 0.6)), []) == ["clean"]
        assert callback.alarms(callback.watch(output(0.4, 0.7, 0.6)), []) == []
    assert caplog.text.count("the reward rose and clean fell") == 2


def test_a_score_that_the_reward_lacks_is_refused_at_the_first_evaluation(callback):
    """Not where a mixture's monitor failed, since its parts are absent then.

    Mutation: let a misspelt headline stand for the reward, or stop a run for a monitor.
    """
    output = RewardOutput(torch.ones(2), torch.ones(2, dtype=torch.bool), {"clean": torch.ones(2)})
    callback.check_names(output, ["broken"])
    with pytest.raises(
        UserError, match=r"viewing\.gold=sharp: the reward has no such score; it has clean"
    ):
        callback.check_names(output, [])
    callback.evaluator.headline = "claen"
    with pytest.raises(UserError, match=r"evaluation\.headline=claen: .* it has clean, reward"):
        callback.check_names(output, ["clean"])
