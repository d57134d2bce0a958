"""Steps with advantages of their own, for what each changed in the score of its sample."""

from functools import partial

import numpy as np
import pytest
import torch
from parallel import run
from runs import SMALL, awake, make, put

from flowrl.advantages import from_mean, gdpo, global_std, group, zscore
from flowrl.errors import UserError
from flowrl.objectives import check_method
from flowrl.training.credit import (
    advantages_of_gains,
    completed_steps,
    completions,
    gains_of,
)
from flowrl.training.metric_means import Record
from flowrl.training.sampling import draw, sample_update
from flowrl.training.scoring import assign_advantages
from flowrl.types import RewardOutput

STEPS = (*SMALL, "loss=grpo", "rollout.credit=step", "batch.group_size=4")


class Brightness:
    """Mean brightness; a sample whose brightest channel is above `limit` is missing."""

    def __init__(self, limit=9.0):
        self.limit = limit

    def __call__(self, images, prompts):
        is_valid = images.amax((1, 2, 3)).cpu() <= self.limit
        return RewardOutput(images.mean((1, 2, 3)).cpu(), is_valid)


def by_hand(policy, conditioned, x, first_step):
    """Images of plain Euler steps from a state before the grid's `first_step`."""
    for interval in policy.algorithm.intervals[first_step:]:
        v = policy.velocity(x, interval.sigma, conditioned.conditioning())
        x = x + v * (interval.sigma_next - interval.sigma)
    return policy.model.decode(x)


@torch.no_grad()
@pytest.mark.parametrize(
    ("steps", "shared"), [("all_but_last", True), ("all_but_last", False), ("subset", True)]
)
def test_completions_are_euler_steps_from_each_state(steps, shared):
    """Before the first stochastic step, and after each but the last, after which a sample completes
    itself where only ODE steps follow. Mutation: begin a step too early or too late, or keep noise.
    """
    policy, data, _ = make(
        *STEPS, f"steps={steps}", f"rollout.shared_initial_noise={str(shared).lower()}"
    )
    awake(policy)
    batch = next(iter(data.iterations))
    stochastic = policy.objective.stochastic_steps(0, 0)
    conditioned, trajectory = draw(policy, batch, range(8), stochastic)
    images = list(completions(policy, conditioned, trajectory))
    assert len(images) == len(stochastic)
    starts = [(stochastic[0], trajectory.x[:, 0])]
    starts += [(step + 1, trajectory.x_next[:, i]) for i, step in enumerate(stochastic[:-1])]
    for (first_step, state), seen in zip(starts, images, strict=True):
        expected = by_hand(policy, conditioned, state, first_step)
        assert (seen - expected).abs().max() < 1e-5
    # Each state before a stochastic step lies on the completion of the one after the last.
    for index, step in enumerate(stochastic[1:], start=1):
        again = by_hand(policy, conditioned, trajectory.x[:, index], step)
        assert (images[index] - again).abs().max() < 1e-5
    last = by_hand(policy, conditioned, trajectory.x_next[:, -1], stochastic[-1] + 1)
    assert (last - policy.model.decode(trajectory.x0)).abs().max() < 1e-5
    together = [image.unflatten(0, (2, 4)) for image in images]
    # Samples that began alike are alike until the first noise.
    assert ((together[0] - together[0][:, :1]).abs().max() < 1e-6) == shared
    assert (together[1] - together[1][:, :1]).abs().max() > 1e-3


def test_a_trajectory_with_one_advantage_completes_nothing():
    """Mutation: complete whatever the credit, which costs images."""
    policy, data, _ = make(*SMALL, "steps=all_but_last")
    [micro_batch, *_] = sample_update(policy, next(iter(data.iterations)), 0, [range(4)])
    assert micro_batch.stages == []


def stage(rewards, is_valid=None):
    values = torch.tensor(rewards)[:, None]
    return values, torch.tensor(is_valid or [True] * len(rewards))


def test_advantages_of_gains_by_hand():
    """Two groups of two. First gains 1 and 3, then 1 and 0; the second group's are equal, and then
    one is missing. Mutation: compare scores in place of gains, or take a gain of a missing score.
    """
    policy, _, _ = make(*STEPS)
    put(policy, advantage=group)
    stages = [
        stage([0.0, 0.0, 5.0, 5.0]),
        stage([1.0, 3.0, 6.0, 6.0], [True, True, True, True]),
        stage([2.0, 3.0, 9.0, 7.0], [True, True, True, False]),
    ]
    groups = torch.tensor([0, 0, 1, 1])
    advantages = advantages_of_gains(policy, stages, torch.ones(1), groups)
    first, second = 1 / (1 + 1e-4), 0.5 / (0.5 + 1e-4)
    expected = [[-first, second], [first, -second], [0.0, 0.0], [0.0, 0.0]]
    assert torch.allclose(advantages.values, torch.tensor(expected), atol=1e-6)
    assert advantages.is_used.tolist() == [True, True, True, True]
    assert advantages.constant_share == pytest.approx(0.25)  # one of two groups, then none
    assert advantages.dropped_share == pytest.approx(0.25)  # none, then one of two
    # A gain over a score that is missing is missing, which leaves one of two.
    stages = [stage([0.0, 0.0], [True, False]), stage([1.0, 3.0])]
    lone = advantages_of_gains(policy, stages, torch.ones(1), torch.tensor([0, 0]))
    assert lone.values.tolist() == [[0.0], [0.0]] and not lone.is_used.any()


EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("kind", [group, global_std, zscore, gdpo, partial(from_mean, scale=1e6)])
@pytest.mark.parametrize("gain", [0.0, 0.25])
def test_rounding_of_scores_is_no_gain(kind, gain):
    """Scores of 5 that a step leaves as they are, or raises by 1/4, but for 4 float32 roundings: no
    sample has gained more than another, and the group is constant. In the other one, where samples
    gain 1 and 2 more, nothing changes; a missing sample's score is no size.

    Mutation: take rounding relative to the gains, or to another group's scores.
    """
    policy, _, _ = make(*STEPS)
    put(policy, advantage=kind)
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    before = torch.full((7,), 5.0)
    jitter = 5 * EPS * torch.tensor([4.0, -4.0, 0.0, 2.0, 0.0, 0.0, 0.0])
    more = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 0.0])
    after = before + gain + jitter + more
    assert len(set((after - before)[:4].tolist())) > 2
    before[6] = after[6] = 1e9
    stages = [stage(before.tolist()), stage(after.tolist(), [True] * 6 + [False])]
    advantages = advantages_of_gains(policy, stages, torch.ones(1), groups)
    assert not advantages.values[:4].any()
    assert advantages.constant_share == 0.5 and advantages.is_used.tolist() == [True] * 6 + [False]
    low, high = advantages.values[4:6, 0].tolist()
    assert low == pytest.approx(-high) and high > 0.4
    alone = advantages_of_gains(
        policy, [(terms[:4], valid[:4]) for terms, valid in stages], torch.ones(1), groups[:4]
    )
    assert not alone.values.any() and alone.constant_share == 1


def test_small_gains_above_rounding_count():
    """1e-4 of scores of 5, and any gain from 0. A gain that is no number is refused later.

    Mutation: a wider tolerance, or an infinite gain that becomes equal to the others.
    """
    before = torch.tensor([[5.0], [5.0], [0.0], [0.0], [1.0], [1.0]])
    after = torch.tensor([[5.0], [5.0004], [0.0], [1e-9], [1.0], [torch.inf]])
    gains = gains_of(before, after, torch.tensor([0, 0, 1, 1, 2, 2]), torch.ones(6, dtype=bool))
    assert torch.equal(gains, after - before) and gains[1] > 3e-4 and gains[5] == torch.inf


def test_updates_train_each_step_on_its_own_gain():
    """Brightness of completions, drawn once more by hand. Mutation: use the stages in another
    order, or forget the last one.
    """
    policy, data, _ = make(*STEPS, "steps=all_but_last", "advantage=group")
    awake(policy)
    policy.reward.reward = Brightness()
    batch = next(iter(data.iterations))
    parts = sample_update(policy, batch, 0, policy.plan.updates(0)[0])
    assert len(parts) > 1
    assign_advantages(policy, parts, Record())
    for part in parts:
        conditioned, trajectory = draw(policy, batch, part.rows, part.trajectory.steps)
        images = list(completions(policy, conditioned, trajectory))
        images.append(policy.model.decode(trajectory.x0))
        scores = torch.stack([image.mean((1, 2, 3)) for image in images]).double()
        gains = scores.diff(dim=0)
        centred = gains - gains.mean(1, keepdim=True)
        expected = centred / (gains.std(1, correction=0, keepdim=True) + 1e-4)
        assert part.advantage.shape == (4, len(trajectory.steps))
        assert torch.allclose(part.advantage.double(), expected.T, atol=1e-3)


def test_too_many_missing_scores_of_completions_stop_the_run():
    """Mutation: look at the finished images' alone."""
    policy, data, _ = make(*STEPS, "steps=all_but_last")
    reward = Brightness()
    policy.reward.reward = reward
    asked = []

    def score(images, prompts):
        asked.append(len(images))
        is_completion = len(asked) % (1 + len(policy.objective.stochastic_steps(0, 0))) != 0
        return RewardOutput(
            images.mean((1, 2, 3)).cpu(), torch.full((len(images),), not is_completion)
        )

    policy.reward.reward = score
    parts = sample_update(policy, next(iter(data.iterations)), 0, policy.plan.updates(0)[0])
    with pytest.raises(RuntimeError, match="missing"):
        assign_advantages(policy, parts, Record())


def test_processes_agree_on_gains():
    """Mutation: compare gains within a process."""
    words = ("rollout.credit=step", "steps=all_but_last", "loss=grpo", "num_iterations=2")
    [alone] = run(1, *words)
    for own in run(2, *words):
        for row, values in own.advantages.items():
            assert values == pytest.approx(alone.advantages[row], abs=1e-3)
        for name, value in alone.parameters.items():
            assert np.abs(own.parameters[name] - value).max() < 1e-5


class OnlyFirst:
    """A choice that keeps the first stochastic step alone."""

    def candidates(self, stochastic):
        return stochastic[:1]

    def draw(self, stochastic, iteration, seed, prompt, sample):
        return stochastic[:1]


def test_what_has_no_gains_is_refused():
    """Mutation: go on with a forward loss, with states that were not kept, or with whole groups."""
    with pytest.raises(UserError, match=r"loss=nft has no stochastic steps.*rollout\.credit"):
        make("loss=nft", "sampler=ode", "rollout.shared_initial_noise=false", "rollout.credit=step")
    policy, _, _ = make(*STEPS, "steps=all_but_last")
    put(policy, trained=OnlyFirst())
    with pytest.raises(UserError, match="choose trained=all"):
        check_method(policy.algorithm)
    with pytest.raises(UserError, match=r"credit=step scores .*WholeGroups, a scorer of whole"):
        make(*STEPS, "~reward.score", "reward._target_=test_credit.WholeGroups")


class WholeGroups(Brightness):
    """A scorer that compares the images of a prompt."""

    whole_groups = True


@pytest.mark.parametrize(("credit", "expected"), [("step", [6, 5, 4, 3, 2]), ("trajectory", [])])
def test_the_steps_that_completions_cost(credit, expected):
    """Of six, of which the first five are stochastic: from the first on, and from each that follows
    one of them but the last. Mutation: count whole rollouts.
    """
    policy, _, _ = make(*STEPS, "steps=all_but_last", f"rollout.credit={credit}")
    whole = completed_steps(policy.algorithm, policy.objective.stochastic_steps(0, 0))
    assert policy.algorithm.num_steps == 6
    assert whole == expected
