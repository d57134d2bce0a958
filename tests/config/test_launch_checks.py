"""What a launch refuses before weights load: strategies, deadlines and the norm of gradients."""

import math

import pytest
import torch
from omegaconf import OmegaConf
from runs import composed
from torch import nn

from flowrl.errors import UserError
from flowrl.launch.build import build, prepare
from flowrl.launch.checks import check_deadlines, check_division, check_trainer
from flowrl.launch.validate import validate
from flowrl.models.experts import Experts
from flowrl.parallel.strategies import clip, norm_limit


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (
            ("trainer=fsdp", "+model.quantization=nf4"),
            ("trainer=fsdp", "model.quantization=nf4", "trainer=ddp"),
        ),
        (
            ("trainer=fsdp", "tuning=full", "backend.compile=true"),
            ("trainer=fsdp", "backend.compile=true"),
        ),
        (
            ("trainer=fsdp", "optimizer=adamw_8bit"),
            ("trainer=fsdp", "optimizer=adamw_8bit", "optimizer=adamw,"),
        ),
        (
            ("trainer=fsdp", "optimizer._target_=bitsandbytes.optim.Lion8bit"),
            ("trainer=fsdp", "optimizer=adamw_8bit", "optimizer=adamw,"),
        ),
        (
            ("trainer=fsdp", "tuning=full", "trainer.num_nodes=2"),
            ("trainer.num_nodes=2", "batch.num_processes=4"),
        ),
        (
            ("+trainer.precision=bf16-mixed",),
            ("trainer.precision=bf16-mixed", "model.dtype=bfloat16"),
        ),
        (("model.dtype=float16",), ("model.dtype=float16", "take bfloat16")),
        (
            ("+trainer.precision=bf16-true",),
            ("trainer.precision=bf16-true", "model.dtype=bfloat16"),
        ),
    ],
)
def test_ways_to_spread_a_run_that_would_go_wrong_are_refused(overrides, names):
    """Mutation: divide bits that are no weights, count one node's processes only, or let autocast
    keep old ones.
    """
    check_trainer(composed("trainer=fsdp", "+model.quantization=null"))
    check_trainer(composed("trainer=fsdp", "tuning=full"))
    check_trainer(
        composed("trainer=fsdp", "tuning=full", "trainer.num_nodes=2", "batch.num_processes=4")
    )
    with pytest.raises(ValueError) as error:
        check_trainer(composed(*overrides))
    assert all(name in str(error.value) for name in names)


def test_two_networks_are_not_divided():
    """Mutation: divide what has no forward pass of its own."""
    networks = Experts({"transformer": nn.Linear(2, 2), "transformer_2": nn.Linear(2, 2)})
    check_division(composed("trainer=ddp"), networks)
    check_division(composed("trainer=fsdp"), nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"^trainer=fsdp .* the pipeline has 2; take trainer=ddp$"):
        check_division(composed("trainer=fsdp"), networks)


def test_scores_are_given_up_before_other_processes_are():
    """The collective's 20 minutes are 1200 s: 3 x 300 s is less, 3 x 400 s is not, nor is 3 x 300 s
    for two services.

    One process waits for nobody. Mutation: compare a single deadline, look at the reward's own
    client only, or at each of a mixture's alone.
    """
    remote = ("reward=remote", "reward.url=http://localhost:8000")
    check_deadlines(composed("trainer=ddp", *remote))
    check_deadlines(composed(*remote, "reward.client.deadline=4000"))
    with pytest.raises(
        ValueError, match=r"reward\.client\.deadline=400 .* trainer\.strategy\.timeout_minutes=20"
    ):
        check_deadlines(composed("trainer=ddp", *remote, "reward.client.deadline=400"))
    cfg = composed("trainer=ddp", "reward=shapes_jpeg", "+http@reward.rewards.judge.client=default")
    cfg.trainer.strategy.timeout_minutes = 15
    with pytest.raises(ValueError, match=r"reward\.rewards\.judge\.client\.deadline=300"):
        check_deadlines(cfg)
    cfg.trainer.strategy.timeout_minutes = 20
    check_deadlines(cfg)
    OmegaConf.set_struct(cfg, False)
    cfg.reward.rewards.second = cfg.reward.rewards.judge
    with pytest.raises(
        ValueError, match=r"judge\.client.* \+ reward\.rewards\.second\.client\.deadline=300"
    ):
        check_deadlines(cfg)


def test_a_hanging_scorer_is_given_up_before_other_processes_are():
    """900 s are less than 20 minutes; 1200 s are not. One process waits for nobody, and null is the
    user's choice.

    Mutation: compare minutes with seconds, or allow equality.
    """
    check_deadlines(composed("trainer=ddp"))
    check_deadlines(composed("trainer=ddp", "scorer_timeout=null"))
    check_deadlines(composed("scorer_timeout=1200"))
    with pytest.raises(
        ValueError, match=r"scorer_timeout=1200 seconds .* trainer\.strategy\.timeout_minutes=20"
    ):
        check_deadlines(composed("trainer=ddp", "scorer_timeout=1200"))


@pytest.mark.parametrize("value", ["0", "-1", "nan", "null", "none"])
def test_a_norm_that_would_break_gradients_is_refused(value):
    """Lightning's 0 and null for no clipping are not ours; the remedy is told. Mutation: take any
    number.
    """
    with pytest.raises(
        ValueError, match=r"max_grad_norm=.* must be above 0; for no clipping set it to \.inf"
    ):
        validate(composed(f"max_grad_norm={value}"))


@pytest.mark.parametrize("value", ["inf", ".inf"])
def test_gradients_need_not_be_clipped(value):
    """As Hydra and as YAML spell it, also where a resumed run takes an override. Mutation: know one
    spelling only.
    """
    weight = torch.nn.Parameter(torch.zeros(2))
    for cfg in (
        composed(f"max_grad_norm={value}"),
        OmegaConf.from_dotlist([f"max_grad_norm={value}"]),
    ):
        weight.grad = torch.tensor([3e9, 4e9])
        assert clip([weight], norm_limit(cfg.max_grad_norm)) == 5e9
        assert weight.grad.tolist() == [3e9, 4e9]
    assert norm_limit(composed().max_grad_norm) == 1


def test_a_run_refuses_a_bad_norm_before_weights_load():
    """Mutation: read the configuration unchecked."""
    with pytest.raises(ValueError, match="max_grad_norm=0 must"):
        build(composed("max_grad_norm=0", "model.pretrained=/nowhere"))


@pytest.mark.parametrize("value", ["inf", ".inf"])
def test_a_run_takes_either_spelling_of_no_clipping(value):
    """Mutation: refuse one, or hand on the word."""
    cfg = composed(f"max_grad_norm={value}")
    validate(cfg)
    assert prepare(cfg).max_grad_norm == math.inf
