import math

import pytest
import torch

from flowrl.losses.nft import NFT
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
