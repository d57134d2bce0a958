import itertools

import pytest
import torch

from flowrl.noise import INITIAL, gaussian_noise


def draw(samples, *, seed=3, iteration=5, step=2, shape=(2, 4, 4)):
    return gaussian_noise(shape, seed=seed, iteration=iteration, samples=samples, step=step)


def test_rows_do_not_depend_on_the_batch():
    """Mutation: one generator for the whole batch."""
    samples = list(itertools.product(range(4), range(3)))
    whole = draw(samples)
    for row in (0, 5, 11):
        assert torch.equal(draw([samples[row]])[0], whole[row])
    assert torch.equal(draw(samples[::-1]), whole.flip(0))


@pytest.mark.parametrize("shape", [(32,), (8, 4), (2, 2, 2, 4)])
def test_the_same_numbers_whatever_the_axes(shape):
    """Mutation: draw the last axes apart."""
    samples = [(0, 1), (3, 2)]
    assert torch.equal(draw(samples, shape=shape).flatten(1), draw(samples).flatten(1))


def test_global_generators_are_left_alone():
    """Mutation: fall back on torch.randn."""
    before = torch.get_rng_state()
    assert torch.equal(draw([(0, 0)]), draw([(0, 0)]))
    assert torch.equal(torch.get_rng_state(), before)


def test_every_index_counts():
    """Mutation: leave any index out of key or counter, or swap prompt and sample into one sum."""
    rows = [draw([(1, 2)])[0], draw([(2, 1)])[0], draw([(1, 1)])[0], draw([(2, 2)])[0]]
    rows += [draw([(1, 2)], **{name: 7})[0] for name in ("seed", "iteration", "step")]
    rows.append(draw([(1, 2)], step=INITIAL)[0])
    for a, b in itertools.combinations(rows, 2):
        assert not torch.isin(a, b).any()


@pytest.mark.parametrize("step", [INITIAL, 0])
def test_standard_normal(step):
    """65,536 values: moments and their neighbours' correlation within 5 standard errors. Mutation:
    uniform noise.
    """
    noise = draw(list(itertools.product(range(64), range(16))), step=step, shape=(64,)).double()
    error = 5 / noise.numel() ** 0.5
    assert abs(noise.mean()) < error
    assert abs(noise.square().mean() - 1) < error * 2**0.5
    assert abs(noise.pow(4).mean() - 3) < error * 96**0.5
    assert abs((noise[1:] * noise[:-1]).mean()) < error
    assert abs((noise[:, 1:] * noise[:, :-1]).mean()) < error
