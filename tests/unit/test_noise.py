import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
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


def test_a_row_is_the_philox_stream_of_its_key_and_counter():
    """Whatever was drawn before. Mutation: go on where the last draw left the generator."""
    draw([(0, 0)], shape=(3,))  # an odd number of 32-bit words, of which one is left over
    bits = np.random.Philox(key=[3, 5], counter=[0, 3, 2, 1])
    wanted = np.random.Generator(bits).standard_normal(32, dtype=np.float32)
    assert np.array_equal(draw([(1, 2)]).flatten().numpy(), wanted)


def test_samples_that_share_their_noise_have_equal_rows():
    """Mutation: put the different ones first."""
    shared, own = (0, 0), (4, 0)
    rows = draw([shared, own, shared, shared])
    assert torch.equal(
        rows, torch.stack([draw([index])[0] for index in (shared, own, shared, shared)])
    )


def test_threads_do_not_draw_from_each_others_streams():
    """Mutation: one generator for all threads."""
    samples = [(0, row) for row in range(200)]
    wanted = draw(samples)
    with ThreadPoolExecutor(4) as pool:
        for noise in pool.map(draw, [samples] * 16):
            assert torch.equal(noise, wanted)


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
