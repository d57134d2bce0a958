import pytest

from flowrl.errors import UserError
from flowrl.training.batch_plan import BatchPlan
from flowrl.training.memory import smaller_micro_batch

BASE = {
    "prompts_per_iteration": 4,
    "group_size": 6,
    "updates_per_iteration": 2,
    "inner_epochs": 1,
    "max_micro_batch": 4,
    "num_processes": 2,
}


def test_plan_by_hand():
    """24 samples, 12 an update, 6 a process and update, in micro-batches of 3.

    Mutation: let rank r take the r-th part of the iteration, or 4 + 2 samples in place of equal
    micro-batches.
    """
    plan = BatchPlan(**BASE)
    assert (plan.num_samples, plan.samples_per_update, plan.micro_batch) == (24, 12, 3)
    assert plan.updates(0) == [[range(0, 3), range(3, 6)], [range(12, 15), range(15, 18)]]
    assert plan.updates(1) == [[range(6, 9), range(9, 12)], [range(18, 21), range(21, 24)]]


def test_plan_in_words():
    """Mutation: count all processes' micro-batches for each."""
    text = BatchPlan(**BASE).describe(3)
    assert "4 prompts x 6 = 24" in text
    assert "2 x 4 of 3 samples" in text
    assert "1 inner epoch x 2 updates of 12 x 3 trained terms" in text
    assert BatchPlan(**BASE).describe(1).endswith(" x 1 trained term")


def test_micro_batches_of_one_are_told_with_the_remedy():
    """143 samples an update are 11 x 13. Mutation: say nothing, or say it where 1 was asked for."""
    counts = {"prompts_per_iteration": 13, "group_size": 11, "updates_per_iteration": 1}
    base = BASE | counts | {"num_processes": 1}
    lines = BatchPlan(**base | {"max_micro_batch": 8}).describe(3).splitlines()
    assert " ".join(lines[-1].split()) == (
        "slow micro-batches of 1: 143 samples of an update have no divisor from 2 to "
        "batch.max_micro_batch=8; raise that to 11, or choose batch.prompts_per_iteration and "
        "batch.group_size so that they have one"
    )
    for asked in (1, 11):
        assert "slow" not in BatchPlan(**base | {"max_micro_batch": asked}).describe(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({name: 0}, f"batch.{name}=0") for name in BASE),
        ({"updates_per_iteration": 5}, "batch.updates_per_iteration=5.*multiple of 10"),
    ],
)
def test_impossible_plans_are_named(change, message):
    """Mutation: drop a bound, or round the split down."""
    with pytest.raises(ValueError, match=message):
        BatchPlan(**BASE | change)


WHOLE = {"prompts_per_iteration": 24, "group_size": 6, "updates_per_iteration": 2}


@pytest.mark.parametrize(
    ("max_micro_batch", "size"), [(6, 6), (11, 6), (12, 12), (23, 18), (35, 18), (36, 36), (99, 36)]
)
def test_whole_groups_are_not_split(max_micro_batch, size):
    """Six groups of six in a process's share of an update: micro-batches of 1, 2, 3 or 6 of them.

    Mutation: divide the samples, or start at another multiple.
    """
    plan = BatchPlan(**BASE | WHOLE | {"max_micro_batch": max_micro_batch}).of_whole_groups()
    assert plan.micro_batch == size
    for rank in (0, 1):
        for update in plan.updates(rank):
            assert all(rows.start % 6 == 0 and len(rows) == size for rows in update)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_micro_batch": 5}, "batch.max_micro_batch=5: the loss compares .*group_size=6"),
        ({"prompts_per_iteration": 6}, "the loss compares the samples of a prompt.*multiple of 4"),
    ],
)
def test_groups_that_would_be_split_are_refused(change, message):
    """Mutation: drop either check."""
    plan = BatchPlan(**BASE | WHOLE | {"max_micro_batch": 6} | change)
    with pytest.raises(UserError, match=message):
        plan.of_whole_groups()


def test_what_is_too_large_for_the_device_may_be_halved_while_groups_stay_whole():
    """Mutation: advise a micro-batch that cannot hold a group."""
    for size, told in ((12, "batch.max_micro_batch=6"), (6, "smaller batch.group_size")):
        plan = BatchPlan(**BASE | WHOLE | {"max_micro_batch": size}).of_whole_groups()
        assert told in smaller_micro_batch(plan)


def test_advantages_need_groups():
    """A loss that looks at none does not. Mutation: compare a sample with itself."""
    BatchPlan(**BASE | {"group_size": 2}).require_groups()
    alone = BatchPlan(**BASE | {"group_size": 1, "prompts_per_iteration": 240})
    with pytest.raises(ValueError, match=r"batch\.group_size=1 must be at least 2: advantages"):
        alone.require_groups()
