"""One job gives the same numbers whatever the number of processes and the size of micro-batches."""

import numpy as np
import pytest
from parallel import run

ROUNDING = {"bound/surrogate": 256e-6}
"""A ratio over 256 dimensions has their mean's rounding so many times; other metrics 1e-6."""


@pytest.fixture(scope="module")
def alone():
    return run(1)[0]


def union(seen, name):
    return {key: value for own in seen for key, value in getattr(own, name).items()}


def assert_equal_runs(seen, alone):
    assert union(seen, "prompts") == alone.prompts
    assert union(seen, "noise") == alone.noise
    for name, tolerance in (("rewards", 1e-6), ("advantages", 1e-4)):
        ours, theirs = union(seen, name), getattr(alone, name)
        assert ours.keys() == theirs.keys()
        assert max(abs(ours[key] - theirs[key]) for key in theirs) < tolerance, name
    for own in seen:
        gaps = [
            np.abs(own.parameters[name] - value).max() for name, value in alone.parameters.items()
        ]
        assert max(gaps) < 1e-5


@pytest.mark.parametrize(
    ("count", "micro_batch"),
    [
        (2, 96),
        pytest.param(2, 1, marks=pytest.mark.slow),
        pytest.param(4, 96, marks=pytest.mark.slow),
    ],
)
def test_processes_change_nothing(alone, count, micro_batch):
    """Prompts and noise are equal, rewards, advantages, weights and metrics up to rounding; one
    all-reduce a step.

    An update has 2 backward passes of a process, or 8 where a micro-batch is one sample. Four
    processes split groups. Of an evaluation each process keeps the images it drew, two of a prompt
    together. Mutation: seed noise by rank, take advantages per process, reduce gradients in every
    backward pass, or deal out batches that split a prompt.
    """
    seen = run(count, f"batch.max_micro_batch={micro_batch}")
    assert_equal_runs(seen, alone)
    assert {own.num_reduces for own in seen} == {alone.num_optimizer_steps} == {6}
    assert all(own.metrics == seen[0].metrics for own in seen)
    assert all(own.evaluation == seen[0].evaluation for own in seen)
    for ours, theirs in zip(seen[0].metrics, alone.metrics, strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert ours[name] == pytest.approx(
                theirs[name], rel=1e-3, abs=ROUNDING.get(name, 1e-6)
            ), name
    assert seen[0].evaluation == pytest.approx(alone.evaluation, rel=1e-3, abs=1e-5)
    for name, rows in alone.drawn.items():
        assert sorted(row for own in seen for row in own.drawn[name]) == rows
        assert all({row ^ 1 for row in own.drawn[name]} == set(own.drawn[name]) for own in seen), (
            "prompts stay whole"
        )


def test_micro_batches_change_nothing(alone):
    """Mutation: divide the loss by the number of samples of a micro-batch instead of averaging over
    terms.
    """
    assert_equal_runs(run(1, "batch.max_micro_batch=2"), alone)


def test_processes_hold_one_threshold():
    """A threshold that holds a KL budget follows the mean over all processes.

    Mutation: let each process observe its own KL.
    """
    one, two = run(
        2, "loss.delta=auto", "loss.kl_budget=1e-5", "batch.inner_epochs=2", "num_iterations=2"
    )
    assert one.delta == two.delta != 0


PAIRS = ("loss=flow_dpo", "sampler=ode", "num_iterations=2")


def test_processes_may_hold_different_numbers_of_pairs():
    """Each has the groups of two prompts whole, and those with equal rewards no pair.

    Mutation: pairs of a process's own statistics, or a process that makes no backward pass.
    """
    one = run(1, *PAIRS)[0]
    two = run(2, *PAIRS)
    assert_equal_runs(two, one)
    assert {own.num_reduces for own in two} == {one.num_optimizer_steps} == {4}
    for ours, theirs in zip(two[0].metrics, one.metrics, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def test_processes_change_nothing_where_the_rewards_gradient_is_taken():
    """Two of a sample's ways to the data come from noise. Scores are of 8-bit pictures, which
    rounding of the weights may move by a level. Mutation: draw the noise by the place in a batch.
    """
    words = ("loss=draft", "sampler=ode", "loss.num_noises=2", "reward=shapes_proxy")
    words += ("num_iterations=2", "evaluation.max_prompts=2")
    [alone] = run(1, *words)
    seen = run(2, "batch.max_micro_batch=2", *words)
    assert union(seen, "prompts") == alone.prompts and union(seen, "noise") == alone.noise
    rewards = union(seen, "rewards")
    assert rewards.keys() == alone.rewards.keys()
    assert max(abs(rewards[key] - value) for key, value in alone.rewards.items()) < 1e-3
    for own in seen:
        gaps = {
            name: np.abs(own.parameters[name] - value).max()
            for name, value in alone.parameters.items()
        }
        assert max(gaps.values()) < 2e-5, gaps
    assert {own.num_reduces for own in seen} == {alone.num_optimizer_steps} == {4}


def test_processes_change_nothing_where_updates_have_real_images():
    """Each takes half of an update's images. Adam's steps follow the sizes of gradients here, of
    which some are so near 0 that rounding turns their sign. Mutation: all of them, or all processes
    the first half.
    """
    words = ("regularizer=shapes", "regularizer.images.count=12", "regularizer.batch=4")
    words += ("regularizer.weight=1.0", "num_iterations=2", "evaluation.max_prompts=2")
    words += ("optimizer.eps=1e-3", "optimizer.lr=1e-2")
    [alone] = run(1, *words)
    seen = run(2, "batch.max_micro_batch=1", *words)
    assert_equal_runs(seen, alone)
    assert {own.num_reduces for own in seen} == {alone.num_optimizer_steps} == {4}
    for ours, theirs in zip(seen[0].metrics, alone.metrics, strict=True):
        assert ours["loss/data"] == pytest.approx(theirs["loss/data"], rel=1e-5)
