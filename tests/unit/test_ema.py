import pytest
import torch

from flowrl.training.ema import EMA


def test_first_averages_by_hand():
    """d = min(decay, n / (n + 9)): 0.1 then 2/11, every second step. Mutation: swap d and 1 - d,
    ignore every.
    """
    ema, weights = EMA(decay=0.9, every=2), {"w": torch.zeros(1, dtype=torch.float64)}
    ema.start(weights)
    weights["w"].fill_(1.0)
    seen = []
    for step in range(1, 5):
        ema.update(weights, step)
        seen.append(ema.weights["w"].item())
    first, second = 0.9, 2 / 11 * 0.9 + 9 / 11
    assert seen == pytest.approx([0, first, first, second], rel=1e-12)


def test_decay_is_the_limit():
    """n / (n + 9) passes 0.5 at n = 9. Mutation: max for min."""
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
