import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flowrl.losses.nft import NFT
from flowrl.losses.reference import ReferencePenalty
from flowrl.losses.sums import paired_mean
from flowrl.types import ForwardInputs

DEFAULTS = {
    "advantage_clip": 5.0,
    "fraction": 0.99,
    "decay_rate": 0.001,
    "decay_start": 0,
    "decay_limit": 0.5,
}


def one(velocity, old_velocity, advantage, is_used=True):
    """One sample of one dimension with x0 = 0 noised to 0.5 at sigma 1/2, in float64."""
    x0, x, v, old = (
        torch.full((1, 1, 1, 1), value, dtype=torch.float64)
        for value in (0, 0.5, velocity, old_velocity)
    )
    half, weight = (
        torch.tensor([0.5], dtype=torch.float64),
        torch.tensor([advantage], dtype=torch.float64),
    )
    return ForwardInputs(x0, x, half, v, old, weight, torch.tensor([is_used]))


@pytest.mark.parametrize("shape", [(2, 1), (1, 1, 2), (1, 2, 1, 1)])
def test_two_dimensions_by_hand_whatever_their_axes(shape):
    """Beta 1, x0 0, x 1/2, sigma 1/2, v+ = v = (.6, .2): errors .2 and .4, mean square .1 over
    their mean .3; v- = 2 old - v with old = v is the same, so that r does not matter.

    Mutation: sum or average over three axes whatever the rank.
    """
    velocity = torch.tensor([0.6, 0.2], dtype=torch.float64).view(1, *shape)
    row = torch.tensor([0.5], dtype=torch.float64)
    x = torch.full_like(velocity, 0.5)
    inputs = ForwardInputs(x - x, x, row, velocity, velocity, row, torch.tensor([True]))
    loss = NFT(beta=1.0, **DEFAULTS)(inputs).loss
    assert loss.item() == pytest.approx(5 * 0.1 / 0.3, rel=1e-12)


def test_by_hand():
    """v = 0.6, old 0.2, beta 1/2: v+ = 0.4 (error 0.3), v- = 0 (error 0.5); A = 2.5 gives r = 3/4;
    e^2 / |e| = |e|.

    Mutation: swap the branches, r without its 1/2, no division by beta.
    """
    loss = NFT(beta=0.5, **DEFAULTS)(one(0.6, 0.2, 2.5)).loss
    assert loss.item() == pytest.approx((0.75 * 0.3 + 0.25 * 0.5) * 5 / 0.5, rel=1e-12)


@pytest.mark.parametrize(("advantage", "expected"), [(5.0, 0.2), (9.0, 0.2), (-9.0, 0.4)])
def test_optimality_is_clamped(advantage, expected):
    """Beta 1: v+ = v = 0.6 (error 0.2), v- = 2 old - v = 0.2 (error 0.4). Mutation: leave r
    unclamped.
    """
    loss = NFT(beta=1.0, **DEFAULTS)(one(0.6, 0.4, advantage)).loss
    assert loss.item() == pytest.approx(5 * expected, rel=1e-12)


@pytest.mark.parametrize("saturates_at", [1.0, 5.0])
def test_unirls_additions_are_keys_that_there_are(saturates_at):
    """Its `adv_std_saturate` C and `ref_deviation_coef`, with its loss written down once more:
    C mean(r e_plus / beta + (1 - r) e_minus / beta) + coefficient mean (v - ref_v)^2.

    Mutation: a bound that clips alone, without the slope and the gain that go with it.
    """
    draw = np.random.default_rng(0).normal(size=(5, 4, 3))
    x0, x, v, old_v, ref_v = draw
    advantage, sigma, beta = np.array([0.4, -0.7, 1.3, -6.0]), 0.6, 0.3
    r = np.clip(advantage, -saturates_at, saturates_at) / saturates_at / 2 + 0.5
    errors = []
    for velocity in (beta * v + (1 - beta) * old_v, (1 + beta) * old_v - beta * v):
        error = x - sigma * velocity - x0
        errors.append((error**2).mean(1) / np.abs(error).mean(1))
    policy = (r * errors[0] / beta + (1 - r) * errors[1] / beta).mean() * saturates_at
    total = policy + 0.1 * ((v - ref_v) ** 2).mean()

    tensors = [torch.from_numpy(values) for values in (x0, x, v, old_v, ref_v, advantage)]
    rows = torch.full((4,), sigma, dtype=torch.float64)
    inputs = ForwardInputs(tensors[0], tensors[1], rows, *tensors[2:4], tensors[5], rows > 0)
    loss = NFT(beta=beta, **DEFAULTS | {"advantage_clip": saturates_at})(inputs).loss
    distance = ReferencePenalty.of_velocities(tensors[2], tensors[4]).mean()
    assert (loss + 0.1 * distance).item() == pytest.approx(total, rel=1e-12)


def test_published_decays():
    """Types 0, 1 and 2 of its code. Mutation: count from another step, or forget the limit."""
    zero, one_, two = (
        NFT(beta=1.0, **DEFAULTS | {"decay_rate": rate, "decay_start": start, "decay_limit": limit})
        for rate, start, limit in ((0.0, 0, 0.0), (0.001, 0, 0.5), (0.0075, 75, 0.999))
    )
    assert [zero.decay(n) for n in (1, 1000)] == [0, 0]
    assert [one_.decay(n) for n in (0, 100, 900)] == pytest.approx([0, 0.1, 0.5])
    assert [two.decay(n) for n in (74, 76, 1000)] == pytest.approx([0, 0.0075, 0.999])


def test_sigmas_that_are_trained():
    """int(0.99 K), at least one. Mutation: train the last, almost clean one."""
    loss = NFT(beta=1.0, **DEFAULTS)
    assert [loss.num_sigmas(k) for k in (1, 6, 10)] == [1, 5, 9]


WRONG = {
    "beta": (0.0,),
    "fraction": (1.5,),
    "decay_limit": (-0.1,),
    "advantage_clip": (math.inf,),
    "decay_rate": (-0.001, math.nan),
    "decay_start": (-1,),
}


@pytest.mark.parametrize(
    "change", [{name: value} for name, values in WRONG.items() for value in values], ids=str
)
def test_wrong_values_are_named(change):
    """Mutation: drop a check."""
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f"loss.{name}={value} must"):
        NFT(**{"beta": 1.0} | DEFAULTS | change)


@pytest.mark.parametrize("count", [2, 3, 255, 4096, 65_536])
def test_a_paired_mean_is_that_of_float64(count):
    """Of float32 numbers whose sizes differ a million times: to the last bit where the count is a
    power of two, which divides without rounding, and else to one. A plain float32 sum, one number
    after the other, is off by hundreds of units in the last place.

    Mutation: leave the rounding errors out of the sum, or an odd number out.
    """
    generator = torch.Generator().manual_seed(count)
    sizes = 10 ** (6 * torch.rand(4, count, generator=generator) - 3)
    values = torch.randn(4, count, generator=generator).abs() * sizes
    wanted = values.double().mean(1)
    got = paired_mean(values.view(4, count, 1))
    assert got.dtype == torch.float32
    eps = torch.finfo(torch.float32).eps
    assert ((got.double() - wanted) / wanted).abs().max() <= eps
    if count & (count - 1) == 0:
        assert torch.equal(got, wanted.float())
    if count == 65_536:
        plain = np.cumsum(values.numpy(), axis=1, dtype=np.float32)[:, -1] / count
        assert np.abs(plain / wanted.numpy() - 1).max() > 10 * eps


class NoFloat64(TorchDispatchMode):
    """A device without float64: no operation may give a tensor of it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        assert not (torch.is_tensor(result) and result.dtype == torch.float64), func
        return result


def test_it_needs_no_float64():
    """Neither forwards nor backwards. Mutation: sum in float64."""
    single = one(0.6, 0.2, 2.5)
    values = {
        name: getattr(single, name).float()
        for name in ("x0", "x", "sigma", "velocity", "old_velocity", "advantage")
    }
    velocity = values["velocity"].requires_grad_()
    with NoFloat64():
        loss = NFT(beta=0.5, **DEFAULTS)(ForwardInputs(**values, is_used=single.is_used)).loss
        loss.backward()
    assert loss.item() == pytest.approx(3.5, rel=1e-6) and velocity.grad.isfinite().all()
