import pytest
import torch

from flowrl.training.ema import EMA


def test_first_averages_by_hand():
    """d = min(decay, (1 + s) / (10 + s)) with s from 0: 2/11 and 4/13 after the second and the
    fourth step. Mutation: swap d and 1 - d, ignore every, or count averagings in place of steps.
    """
    ema, weights = EMA(decay=0.9, every=2), {"w": torch.zeros(1, dtype=torch.float64)}
    ema.start(weights)
    weights["w"].fill_(1.0)
    seen = []
    for step in range(1, 5):
        ema.update(weights, step)
        seen.append(ema.weights["w"].item())
    first, second = 9 / 11, 4 / 13 * 9 / 11 + 9 / 13
    assert seen == pytest.approx([0, first, first, second], rel=1e-12)


@pytest.mark.parametrize("every", [1, 8])
def test_a_plain_average_over_700_steps(every):
    """Weights that wander, averaged as published: d = min((1 + s) / (10 + s), decay), s the number
    of the optimizer step. The decay is reached at s = 80, whatever `every` is.

    Mutation: count averagings, with which `every=8` reaches the decay at step 648.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.zeros(3, dtype=torch.float64)
    ema = EMA(decay=0.9, every=every)
    ema.start({"w": weight})
    plain = [0.0, 0.0, 0.0]
    for s in range(700):
        weight += torch.randn(3, generator=generator, dtype=torch.float64)
        ema.update({"w": weight}, s + 1)
        if s % every == every - 1:
            d = min((1 + s) / (10 + s), 0.9)
            pairs = zip(plain, weight.tolist(), strict=True)
            plain = [d * average + (1 - d) * value for average, value in pairs]
        assert ema.weights["w"].tolist() == pytest.approx(plain, rel=1e-12, abs=1e-12)


def test_decay_is_the_limit():
    """(1 + s) / (10 + s) passes 0.5 at s = 8. Mutation: max for min."""
    ema, weights = EMA(decay=0.5, every=1), {"w": torch.ones(1, dtype=torch.float64)}
    ema.start({"w": torch.zeros(1, dtype=torch.float64)})
    ema.update(weights, 100)
    assert ema.weights["w"].item() == 0.5


def test_average_holds_copies_without_gradient():
    """Mutation: keep references to the parameters."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    ema = EMA(decay=0.9, every=1)
    ema.start({"w": parameter})
    with torch.no_grad():
        parameter.add_(1)
    assert ema.weights["w"].tolist() == [0, 0]
    ema.update({"w": parameter}, 1)
    assert not ema.weights["w"].requires_grad
    assert parameter.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("change", "message"), [({"decay": 1.0}, r"ema.decay=1\.0"), ({"every": 0}, "ema.every=0")]
)
def test_bounds(change, message):
    """Mutation: allow decay 1, which never learns."""
    with pytest.raises(ValueError, match=message):
        EMA(**{"decay": 0.9, "every": 1} | change)
