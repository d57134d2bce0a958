"""AdamW with its state in 8 bits, by bitsandbytes where it is installed."""

import sys

import pytest
import torch
from runs import composed

from flowrl.errors import UserError
from flowrl.launch.build import prepare
from flowrl.runs import checkpoint
from flowrl.training import eight_bits

SHAPES = [(64, 64), (3, 5)]
"""One of 4,096 weights, the least that are held in 8 bits, and a small one."""


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip("bitsandbytes")


def made(weights, lr=1e-3):
    return eight_bits.adamw(weights, lr=lr, betas=[0.9, 0.99], weight_decay=0.1, eps=1e-8)


def start():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES]


def advance(weights, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()


def test_it_steps_as_adamw_does(bitsandbytes):
    """The first step is that of 32 bits, since it rounds the moments after it; the second one's
    rounding is a fifth of a step at most, and none in the small matrix. The loop reads `eps`.

    Mutation: swap the decays, leave weight decay out, or keep 32 bits.
    """
    ours, theirs = start(), start()
    mine = made(ours)
    exact = torch.optim.AdamW(theirs, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, eps=1e-8)
    for step, bound in enumerate((1e-6, 3e-4)):
        advance(ours, mine, [step])
        advance(theirs, exact, [step])
        pairs = zip(ours, theirs, strict=True)
        gaps = [float((a.detach() - b.detach()).abs().max()) for a, b in pairs]
        assert gaps[0] < bound and gaps[1] < 1e-6
    assert gaps[0] > 1e-6  # it did round
    assert mine.param_groups[0]["eps"] == 1e-8
    large, small = (mine.state[weight] for weight in ours)
    assert (large["state1"].dtype, small["state1"].dtype) == (torch.uint8, torch.float32)


def test_it_continues_bitwise_from_a_checkpoint(bitsandbytes, tmp_path):
    """Saved after 3 of 6 steps. Mutation: write the table that all states hold once, or leave the
    count of steps a tensor.
    """
    whole = start()
    optimizer = made(whole)
    advance(whole, optimizer, range(3))
    tensors = {"optimizer": checkpoint.optimizer_tensors(optimizer)}
    path = checkpoint.save(tmp_path, keep=1, weights=tensors, state={"num_iterations": 3})
    resumed = [weight.detach().clone().requires_grad_() for weight in whole]
    fresh = made(resumed)
    checkpoint.load_optimizer_tensors(fresh, checkpoint.load(path)[0]["optimizer"])
    advance(whole, optimizer, range(3, 6))
    advance(resumed, fresh, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_its_state_is_counted_without_a_step(bitsandbytes):
    """4,096 weights: both moments in a byte each, a scale of 4 bytes for each of 16 blocks of
    either, and two tables of 256 numbers that all share; 15 weights in 8 bytes each.

    Mutation: count the tables for each weight, or 8 bits for all.
    """
    weights = [torch.empty(shape, device="meta", requires_grad=True) for shape in SHAPES]
    weights.append(torch.empty(64, 64, device="meta", requires_grad=True))
    table = 2 * 256 * 4
    large = 2 * 4096 + 2 * 16 * 4
    assert eight_bits.first_state(made(weights)) == 2 * large + table + 15 * 8


class Tables(torch.optim.Optimizer):
    """Keeps its count of steps and a table as bitsandbytes does: a plain number, and one tensor for
    all weights.
    """

    def __init__(self, weights):
        super().__init__(weights, {"lr": 0.1})
        self.table = torch.arange(4.0)

    def step(self):
        for weight in self.param_groups[0]["params"]:
            state = self.state[weight]
            state.setdefault("step", 0)
            state["table"] = self.table
            state["step"] += 1


def test_a_table_of_all_states_and_a_plain_count_are_saved(tmp_path):
    """Mutation: hand safetensors one tensor under two names, or give a tensor back for the
    count.
    """
    optimizer = Tables([torch.zeros(2, requires_grad=True) for _ in range(2)])
    optimizer.step()
    tensors = {"optimizer": checkpoint.optimizer_tensors(optimizer)}
    path = checkpoint.save(tmp_path, keep=1, weights=tensors, state={"num_iterations": 1})
    weights = [torch.zeros(2, requires_grad=True) for _ in range(2)]
    fresh = Tables(weights)
    checkpoint.load_optimizer_tensors(fresh, checkpoint.load(path)[0]["optimizer"])
    for weight in weights:
        state = fresh.state[weight]
        assert state["step"] == 1 and isinstance(state["step"], int)
        assert state["table"].tolist() == [0, 1, 2, 3]


def test_a_missing_package_is_told_before_weights_load(monkeypatch):
    """Mutation: look for it once the optimizer is made."""
    prepare(composed("debug=smoke"))
    for name in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"adamw_8bit .* 'flowrl-lightning\[optim\]'$"):
        prepare(composed("debug=smoke", "optimizer=adamw_8bit"))
