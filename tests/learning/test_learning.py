"""Training raises a reward, on the real loop and the embedded model, over several seeds."""

import pytest
import torch
from runs import CONF, fit, make

from flowrl.types import RewardOutput


class Darkness:
    """An easy reward: minus the mean brightness, so more and larger shapes score higher."""

    def __call__(self, images, prompts):
        return RewardOutput(1 - images.mean((1, 2, 3)).cpu(), torch.ones(len(prompts), dtype=torch.bool))


def gain(seed, *overrides):
    """Mean reward of the last three of fifteen iterations minus that of the first three."""
    size = ("num_iterations=15", "batch.prompts_per_iteration=8", "batch.group_size=12")
    policy, data, _ = make(f"seed={seed}", *size, *overrides)
    policy.reward.reward = Darkness()
    rewards = []
    policy.report = lambda values: rewards.append(values["reward/mean"])
    fit(policy, data)
    return sum(rewards[-3:]) / 3 - sum(rewards[:3]) / 3


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("method", [("sampler=cps", "loss=dppo"), ("sampler=flow_sde", "loss=grpo")])
def test_reward_rises(method, seed):
    """The margin is about a third of the smallest gain seen over these seeds. Mutation: flip the advantage's sign."""
    assert gain(seed, *method, "optimizer.lr=1e-3") > MARGIN


MARGIN = 0.005

RECIPES = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
RECIPE_MARGIN = 0.02


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_raises_the_embedded_reward(recipe, seed):
    """30 iterations of 288 images: the last five rewards against the first five. Mutation: flip a loss's sign."""
    policy, data, _ = make(f"experiment={recipe}", f"seed={seed}", "num_iterations=30", base=("name=test",))
    rewards = []
    policy.report = lambda values: rewards.append(values["reward/mean"])
    fit(policy, data)
    raised = sum(rewards[-5:]) / 5 - sum(rewards[:5]) / 5
    print(f"{recipe}, seed {seed}: {raised:+.4f}")  # for `pytest -s`
    assert raised > RECIPE_MARGIN
