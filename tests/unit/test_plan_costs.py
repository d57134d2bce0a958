"""What a plan proposes beside bytes: rows that keep a GPU busy, hours and money."""

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from flowrl.cli import plan as plan_memory
from flowrl.cli.memory_plan import Plan
from flowrl.cli.plan_costs import Choice, Pace, Work, enough
from flowrl.errors import UserError
from flowrl.models.meta_memory import tokens_of
from flowrl.training.batch_plan import BatchPlan


class Counted(Plan):
    """A plan of two processes that draw 30 images each, without a network."""

    samples = 30

    def __init__(self):
        self.cfg = OmegaConf.create({"num_iterations": 3})
        self.plan = BatchPlan(
            prompts_per_iteration=6,
            group_size=10,
            updates_per_iteration=1,
            inner_epochs=1,
            max_micro_batch=10,
            num_processes=2,
        )

    def work(self, is_checkpointed):
        return Work(5 * 10**15, 10**15, 2 * 10**15) if is_checkpointed else Work(0, 0, 1)


@pytest.mark.parametrize(("num_tokens", "rows"), [(1024, 4), (1536, 3), (4096, 1), (9000, 1)])
def test_rows_that_keep_a_gpu_busy_have_4096_tokens(num_tokens, rows):
    """Mutation: count rows and not tokens, or round down."""
    assert enough(num_tokens) == rows


def test_tokens_are_those_of_the_widest_layer():
    """Two rows of 5 tokens, of which the second layer sees one each. Mutation: the last layer's."""
    first, last = nn.Linear(4, 4, device="meta"), nn.Linear(4, 4, device="meta")
    network = nn.ModuleList([first, last])
    x = torch.empty(2, 5, 4, device="meta")
    assert tokens_of(network, lambda: last(first(x)[:, 0])) == 10
    assert not first._forward_pre_hooks


def test_hours_follow_from_a_share_of_the_rating():
    """100 TFLOP/s at 0.4 are 1.44e17 operations an hour. Mutation: minutes, not hours."""
    assert Pace(100, (0.2, 0.4), None).hours(1.44e18) == pytest.approx([10, 20])


def test_a_runs_hours_are_those_of_its_images():
    """30 images of 8e15 operations with recomputed blocks, 3 iterations: 7.2e17, 5 to 10 hours; two
    GPUs cost twice that.

    Mutation: one iteration, one image, the work without recomputing, or one GPU's price.
    """
    plan = Counted()
    line = plan_memory.duration(plan, Choice(2, True), Pace(100, (0.2, 0.4), 0.5))
    assert line == (
        "predicted, at 0.2 to 0.4 of 100 TFLOP/s: 3 iterations in 5 to 10 hours, which cost 5 to "
        "10 at 0.5 an hour and GPU"
    )
    line = plan_memory.duration(plan, Choice(2, True), Pace(100, (0.4,), None))
    assert line == "predicted, at 0.4 of 100 TFLOP/s: 3 iterations in 5 hours"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (((24.0,), None, (0.2,), (0.5,)), "--price wants --tflops"),
        (((24.0, 80.0), (1.0, 2.0, 3.0), (0.2,), None), "--tflops has 3 values for 2 of --gpu"),
        (((24.0,), (1.0,), (0.2, 1.5), None), "--share=1.5: no GPU does more"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(arguments, words):
    """Mutation: let them through."""
    with pytest.raises(UserError, match=words):
        plan_memory.paces(*arguments)


def test_one_rating_stands_for_all_gpus():
    """Mutation: the first GPU alone, or one price for ratings of each."""
    assert plan_memory.paces((24, 80), None, (0.2,), None) == [None, None]
    paces = plan_memory.paces((24, 80), (165.0, 990.0), (0.2,), (0.4,))
    assert paces == [Pace(165.0, (0.2,), 0.4), Pace(990.0, (0.2,), 0.4)]


def test_micro_batches_of_a_loss_that_compares_hold_whole_groups():
    """A process's 30 samples of an update are three groups of ten. Mutation: list all divisors."""
    counted = Counted()
    assert counted.micro_batches() == [1, 2, 3, 5, 6, 10, 15, 30]
    counted.plan = counted.plan.of_whole_groups()
    assert counted.micro_batches() == [10, 30]
