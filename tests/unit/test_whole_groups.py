"""A scorer that compares the images of a prompt is asked for whole groups."""

import math
from concurrent.futures import Future

import pytest
import torch
from runs import fit, make

from flowrl.errors import UserError
from flowrl.rewards.mixture import Mixture
from flowrl.rewards.routed import Routed
from flowrl.training.batch_plan import BatchPlan
from flowrl.training.reward import RewardModule
from flowrl.types import Prompt, RewardOutput


class Rank:
    """Scores an image by how many of its prompt's images are darker, and notes each call."""

    whole_groups = True

    def __init__(self):
        self.calls = []

    def __call__(self, images, prompts):
        self.calls.append([prompt.text for prompt in prompts])
        if "bad" in self.calls[-1]:
            raise RuntimeError("no ranks for bad prompts")
        brightness = images.mean((1, 2, 3))
        ranks = (brightness[:, None] > brightness[None]).sum(1).float()
        return RewardOutput(ranks, torch.ones(len(prompts), dtype=torch.bool))


def pictures(*brightness):
    return torch.tensor(brightness).view(-1, 1, 1, 1).repeat(1, 3, 2, 2)


def prompts(texts):
    return [Prompt(text) for text in texts]


def test_groups_are_put_together_from_several_submissions():
    """Six samples, groups of three, submitted as two, two and two: the first group spans two
    submissions, so that nothing is asked before the fourth sample is there, and the second group
    not before the sixth.

    Mutation: rank within a submission, ask before a group is whole, or mix up the answers.
    """
    reward = Rank()
    module = RewardModule(reward=reward, max_missing=0.0)
    images = pictures(0.3, 0.1, 0.2, 0.4, 0.6, 0.5)
    texts = prompts("aaabbb")
    scores = []
    for first in (0, 2, 4):
        assert reward.calls == []
        rows = slice(first, first + 2)
        scores.append(module.submit(images[rows], texts[rows], first=first, group_size=3))
    got = module.collect(scores)
    assert got.values.tolist() == [2, 0, 1, 0, 2, 1]
    assert reward.calls == [["a"] * 3, ["b"] * 3]
    assert got.terms[:, 0].tolist() == got.values.tolist()


def test_a_round_that_was_broken_off_leaves_nothing_behind():
    """Nor anybody waiting. Mutation: put the next round's samples behind those that are left, or
    let whoever asks for these wait for ever.
    """
    reward = Rank()
    module = RewardModule(reward=reward, max_missing=0.0)
    left = module.submit(pictures(0.9), prompts("x"), first=0, group_size=2)
    scores = module.submit(pictures(0.1, 0.2), prompts("aa"), first=0, group_size=2)
    assert module.collect([scores]).values.tolist() == [0, 1]
    assert reward.calls == [["a", "a"]]
    with pytest.raises(RuntimeError, match="the rest of its group never came"):
        left.result(5)


def test_a_group_that_never_gets_whole_is_told():
    """Mutation: wait for ever."""
    module = RewardModule(reward=Rank(), max_missing=0.0)
    scores = module.submit(pictures(0.9), prompts("x"), first=0, group_size=2)
    with pytest.raises(UserError, match="Rank asks for whole groups, but the last one is not"):
        module.collect([scores])


def test_what_a_scorer_breaks_with_reaches_whoever_waits(monkeypatch):
    """Mutation: leave the futures of held-back samples without an answer."""
    module = RewardModule(reward=Rank(), max_missing=0.0)
    monkeypatch.setattr(module, "score", lambda *arguments: 1 / 0)
    scores = module.submit(pictures(0.1, 0.2), prompts("aa"), first=0, group_size=2)
    assert isinstance(scores, Future)
    with pytest.raises(ZeroDivisionError):
        scores.result(5)


def test_a_fault_costs_its_own_group():
    """A group that raises is missing as a whole and is not asked again in halves; an image that is
    not finite is left out of its group.

    Mutation: halve a group, or rank among pictures that are not finite.
    """
    reward = Rank()
    module = RewardModule(reward=reward, max_missing=1.0)
    images = pictures(0.1, 0.2, 0.3, math.nan, 0.5, 0.6)
    got = module.score(images, prompts(["bad", "bad", "b", "b", "c", "c"]), 2)
    assert got.is_valid.tolist() == [False, False, True, False, True, True]
    assert got.values.tolist() == [0, 0, 0, 0, 0, 1]
    assert reward.calls == [["bad"] * 2, ["b"], ["c"] * 2]
    assert "no ranks for bad prompts" in got.info[0]["missing"]


def test_mixtures_and_routes_pass_the_wish_on():
    """Mutation: lose the attribute in one of them."""
    ranks = Routed(reward=Rank(), key="family", values=["x"])
    assert ranks.whole_groups
    mixture = Mixture(rewards={"rank": ranks, "other": Rank()}, weights={"rank": 1, "other": 0})
    assert mixture.whole_groups
    texts = [Prompt("a", family="x"), Prompt("a", family="x"), Prompt("b"), Prompt("b")]
    module = RewardModule(reward=mixture, max_missing=0.0)
    got = module.score(pictures(0.1, 0.2, 0.4, 0.3), texts, 2)
    assert got.values[:2].tolist() == [0, 1] and got.values[2:].isnan().all()
    assert got.parts["other"].tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("num_prompts", "updates", "processes", "multiple"),
    [(4, 2, 2, None), (4, 1, 1, None), (3, 2, 1, 2), (6, 2, 2, 4)],
)
def test_groups_are_not_split_over_updates_or_processes(num_prompts, updates, processes, multiple):
    """Mutation: look at the processes alone."""
    plan = BatchPlan(
        prompts_per_iteration=num_prompts,
        group_size=4,
        updates_per_iteration=updates,
        inner_epochs=1,
        max_micro_batch=3,
        num_processes=processes,
    )
    if multiple is None:
        plan.require_whole_groups()
        return
    with pytest.raises(UserError, match=f"make it a multiple of {multiple}"):
        plan.require_whole_groups()


def test_a_run_trains_and_evaluates_on_whole_groups():
    """Micro-batches of four cut groups of six; every call has one prompt's images, six of them in
    training and as many as the evaluation draws there.

    Mutation: submit without numbers, or number an evaluation's samples by batches.
    """
    policy, data, evaluator = make(
        "num_iterations=1",
        "batch.prompts_per_iteration=4",
        "batch.group_size=6",
        "batch.updates_per_iteration=2",
        "batch.max_micro_batch=4",
        "evaluation.images_per_prompt=2",
        "evaluation.batch_size=3",
    )
    assert policy.plan.micro_batch == 4
    reward = Rank()
    policy.reward.reward = reward
    fit(policy, data)
    assert [len(call) for call in reward.calls] == [6] * 4
    assert all(len(set(call)) == 1 for call in reward.calls)
    assert policy.last_metrics["reward/mean"] == pytest.approx(2.5, abs=0.5)
    reward.calls.clear()
    result = evaluator.evaluate(policy)
    assert {len(call) for call in reward.calls} == {2}
    assert all(output.is_valid.all() for output in result.scores.values())
