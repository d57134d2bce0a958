import pytest
import torch

from flowrl.advantages import group
from flowrl.training.learning import CONDITIONS, Learning, NothingLearned

WEIGHTS, GROUPS = torch.ones(1), torch.tensor([0, 0, 1, 1])
ALL = torch.ones(4, dtype=torch.bool)


def iterate(learning, rewards, gradient, rate, is_valid=ALL, decay=0.0):
    """One iteration of one weight matrix: rewards of two groups of two, and one step of AdamW."""
    advantages = group(torch.tensor(rewards)[:, None], WEIGHTS, GROUPS, is_valid)
    learning.take(bool(is_valid.any()), advantages)
    weight = torch.nn.Parameter(torch.tensor([[1.0, -1.0]]))
    optimizer = torch.optim.AdamW([weight], lr=rate, weight_decay=decay, eps=1e-12)
    weight.grad = torch.tensor([gradient])
    with learning.watch([weight], weight.grad.norm()):
        optimizer.step()


def verdict(learning):
    with pytest.raises(NothingLearned, match=r"^nothing was learned in 7 iterations: ") as caught:
        learning.check(7)
    return str(caught.value)


EQUAL, UNEQUAL = [0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2000001]
CASES = {
    "rewards": {"rewards": UNEQUAL, "gradient": [1.0, 1.0], "rate": 0.1, "is_valid": ~ALL},
    "advantages": {"rewards": EQUAL, "gradient": [1.0, 1.0], "rate": 0.1},
    "gradients": {"rewards": UNEQUAL, "gradient": [0.0, 0.0], "rate": 0.1, "decay": 0.1},
    "changes": {"rewards": UNEQUAL, "gradient": [1.0, 1.0], "rate": 0.0},
}


@pytest.mark.parametrize("name", CASES)
def test_what_was_lacking_is_named(name):
    """Equal rewards with a gradient, which a penalty gives; weight decay without one; a rate of 0.

    Mutation: ask whether weights differ from their start, which decay and penalty do without
    learning.
    """
    learning = Learning()
    for _ in range(3):
        iterate(learning, **CASES[name])
    assert CONDITIONS[name] in verdict(learning)


@pytest.mark.parametrize(
    ("gradient", "rate"), [([1e-15, 0.0], 1e-3), ([1.0, -1.0], 2e-7)], ids=["tiny", "opposite"]
)
def test_the_slowest_learning_counts(gradient, rate):
    """One pair of unlike rewards, one step of 1e-6 or 2e-7, in one of three iterations; changes
    that cancel in a sum.

    Mutation: a tolerance on rewards, gradients or weights, or the plain sum of all weights.
    """
    learning = Learning()
    iterate(learning, EQUAL, [0.0, 0.0], 0.1)
    iterate(learning, UNEQUAL, gradient, rate)
    iterate(learning, EQUAL, [0.0, 0.0], 0.1)
    learning.check(7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_changes_that_cancel_in_a_sum_of_bits_count(dtype):
    """1.25 and 1.5 come as near to each other as 2^-6 twice, in numbers of one exponent.

    Mutation: sum the bits alone.
    """
    learning = Learning()
    learning.take(True, group(torch.tensor(UNEQUAL)[:, None], WEIGHTS, GROUPS, ALL))
    weight = torch.tensor([1.25, 1.5], dtype=dtype)
    with learning.watch([weight], torch.ones(())):
        weight += torch.tensor([2**-6, -(2**-6)], dtype=dtype)
    assert "changes" in learning.met
    with learning.watch([weight], torch.ones(())):
        pass
    assert learning.met == {"rewards", "advantages", "gradients", "changes"}


def test_a_rate_below_a_weight_s_last_bit_changes_nothing():
    """AdamW moves by the rate, and half of 6e-8 is lost beside 1. Mutation: count steps with a
    gradient.
    """
    learning = Learning()
    iterate(learning, UNEQUAL, [1.0, 1.0], 1e-9)
    assert CONDITIONS["changes"] in verdict(learning)


def test_gradient_and_advantage_must_come_together():
    """Mutation: remember the advantages of an earlier iteration."""
    learning = Learning()
    iterate(learning, UNEQUAL, [0.0, 0.0], 0.1)
    iterate(learning, EQUAL, [1.0, 1.0], 0.1)
    assert CONDITIONS["gradients"] in verdict(learning)


def test_a_resumed_run_remembers():
    """Learning before the stop counts, and so does a checkpoint that knows nothing of it. Mutation:
    begin anew.
    """
    first, resumed, old = Learning(), Learning(), Learning()
    iterate(first, UNEQUAL, [1.0, 1.0], 0.1)
    resumed.load_state(first.state())
    old.load_state(None)
    for learning in (resumed, old):
        iterate(learning, EQUAL, [0.0, 0.0], 0.1)
        learning.check(7)
    fresh = Learning()
    fresh.load_state([])
    assert CONDITIONS["rewards"] in verdict(fresh)


@pytest.mark.parametrize("has_reward", [True, False])
def test_rewards_are_enough_where_nothing_is_compared(has_reward):
    """One sample a prompt, whose advantage is 0: a gradient of its own reward has taught, and one
    of a penalty alone, without any reward, has not.

    Mutation: ask for an advantage whatever the loss, or for none of the two.
    """
    learning = Learning(needs_advantages=False)
    alone = group(torch.ones(2, 1), WEIGHTS, torch.tensor([0, 1]), torch.tensor([has_reward] * 2))
    assert not alone.values.any()
    learning.take(has_reward, alone)
    weight = torch.zeros(2)
    with learning.watch([weight], torch.ones(())):
        weight.add_(1.0)
    if has_reward:
        learning.check(7)
    else:
        assert CONDITIONS["rewards"] in verdict(learning)
        assert not learning.met
