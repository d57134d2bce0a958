"""What each sampler of conf/sampler keeps, whatever its formula: an option added there is tested
too.
"""

import copy
import dataclasses
import math
import pickle
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from hydra.utils import instantiate
from runs import CONF, composed

from flowrl.algorithm import sampler_option
from flowrl.gaussian import Likelihood, tv
from flowrl.rollout import replay, rollout
from flowrl.samplers.ode import ODE
from flowrl.samplers.protocol import Sampler, Solver
from flowrl.schedule import LinearShift, intervals
from flowrl.types import Trajectory

OPTIONS = sorted(path.stem for path in (CONF / "sampler").glob("*.yaml"))
NUM_STEPS = 8
GRID = intervals(LinearShift(shift=3.0), NUM_STEPS)
LIKELIHOOD = Likelihood(reduction="mean", form="gaussian")


@cache
def configured(name):
    return instantiate(composed(f"sampler={name}").sampler)


@pytest.fixture(params=OPTIONS)
def sampler(request):
    return configured(request.param)


def is_noisy(sampler):
    return hasattr(sampler, "noise_level")


def draw(count, dtype=torch.float64, seed=0):
    """A state, a velocity and noise."""
    generator = torch.Generator().manual_seed(seed)
    shape = (3, count, 2, 4, 4)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).unbind()


def wavy(x, sigma, is_shared=False):
    """A velocity field whose last bits depend on the order of operations."""
    return torch.sin(3 * x) * sigma + x.flip(-1) / 3


def draw_rollout(sampler, x, noises, stochastic=()):
    return rollout(
        wavy,
        x,
        GRID,
        sampler=sampler,
        stochastic=stochastic,
        noise=noises.__getitem__,
        shares_start=False,
    )


def noises(rows=slice(None)):
    """Noise of each step for five samples, or for some of them."""
    return {k: draw(5, torch.float32, seed=k + 1)[2][rows] for k in range(NUM_STEPS)}


def stochastic_of(sampler):
    """Steps that a rollout may draw noise at: none of a deterministic sampler."""
    return (0, 1, 2, 4) if is_noisy(sampler) else ()


def test_it_is_a_sampler_under_its_name(sampler, request):
    """Frozen, and deterministic ones are solvers. Mutation: a class whose word is no option of
    `sampler=`, or a state.
    """
    assert isinstance(sampler, Sampler)
    assert sampler_option(sampler) == request.node.callspec.params["sampler"]
    assert isinstance(sampler, Solver) == (not is_noisy(sampler))
    assert type(sampler).__dataclass_params__.frozen


@pytest.mark.parametrize("remade", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_is_the_same_sampler(sampler, remade):
    """Mutation: keep what cannot be copied."""
    x, velocity, _ = draw(2)
    assert remade(sampler) == sampler
    step, other = (one.step(x, velocity, GRID[2]) for one in (sampler, remade(sampler)))
    assert torch.equal(step.mean, other.mean) and step.std == other.std


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", range(NUM_STEPS))
def test_a_step_is_a_gaussian_of_its_own_std(sampler, k, dtype):
    """In shape and dtype of the state; std is no negative number, and 0 where nothing is random.

    Mutation: let `std` and `step` disagree, or noise of another size than std.
    """
    x, velocity, noise = draw(3, dtype)
    step = sampler.step(x, velocity, GRID[k])
    assert step.mean.shape == x.shape and step.mean.dtype == dtype and step.mean.isfinite().all()
    assert type(step.std) is float and math.isfinite(step.std) and step.std >= 0
    assert step.std == sampler.std(GRID[k])
    assert torch.equal(step.sample(noise), step.mean + step.std * noise)
    if not is_noisy(sampler):
        assert step.std == 0 and torch.equal(step.sample(noise), step.mean)
    elif k in range(1, NUM_STEPS - 1):
        assert step.std > 0


@pytest.mark.parametrize("k", range(NUM_STEPS))
def test_the_mean_is_linear_with_its_gain(sampler, k):
    """The objective divides differences of means by `gain`. Mutation: any term of a gain, or a
    mean that is clamped.
    """
    x, velocity, change = draw(3)
    mean = sampler.step(x, velocity, GRID[k]).mean
    moved = sampler.step(x, velocity + change, GRID[k]).mean
    torch.testing.assert_close(moved - mean, sampler.gain(GRID[k]) * change, rtol=1e-9, atol=1e-11)
    assert sampler.gain(GRID[k]) < 0, "the velocity points from data to noise"


@pytest.mark.parametrize("k", range(NUM_STEPS))
def test_without_noise_it_is_the_ode(sampler, k):
    """Mutation: a sign in any mean, sigma for sigma_next."""
    still = dataclasses.replace(sampler, noise_level=0.0) if is_noisy(sampler) else sampler
    x, velocity, _ = draw(3)
    step, euler = still.step(x, velocity, GRID[k]), ODE().step(x, velocity, GRID[k])
    torch.testing.assert_close(step.mean, euler.mean, rtol=1e-10, atol=1e-10)
    assert step.std == 0


def test_noise_that_is_no_level_is_refused(sampler):
    """Mutation: drop the check."""
    for value in (-0.1, math.nan) if is_noisy(sampler) else ():
        with pytest.raises(ValueError, match=f"sampler.noise_level={value}"):
            dataclasses.replace(sampler, noise_level=value)


def test_the_last_step_lands_on_the_data(sampler):
    """With the true velocity of a sample, noise - data, the mean at sigma 0 is the data, but for
    the drift that belongs to a reverse SDE's noise.

    Mutation: a last step that keeps some of the noise.
    """
    x0, noise, _ = draw(3)
    last = GRID[-1]
    assert last.sigma_next == 0
    step = sampler.step(torch.lerp(x0, noise, last.sigma), noise - x0, last)
    drift = step.std**2 / (2 * last.sigma)
    torch.testing.assert_close(step.mean, x0 - drift * noise, rtol=1e-10, atol=1e-12)


def test_a_rollout_without_stochastic_steps_keeps_its_samples_alone(sampler):
    """Of the ODE, or of the solver itself. Mutation: draw noise where no step is stochastic."""
    x = draw(5, torch.float32)[0]
    trajectory = draw_rollout(sampler, x, {})
    assert trajectory.steps == () and trajectory.x.shape == (5, 0, 2, 4, 4)
    assert trajectory.x0.shape == x.shape and trajectory.x0.isfinite().all()
    if is_noisy(sampler):
        assert torch.equal(trajectory.x0, draw_rollout(ODE(), x, {}).x0)


def test_a_replay_is_the_rollout_bitwise(sampler):
    """From the stored states alone: mean and the state after the step, log-ratio 0 and no
    divergence.

    Mutation: replay from x_next, at the wrong sigma, or with a mean written in another order.
    """
    stochastic = stochastic_of(sampler)
    drawn = noises()
    trajectory = draw_rollout(sampler, draw(5, torch.float32)[0], drawn, stochastic)
    assert trajectory.steps == stochastic
    for index, k in enumerate(stochastic):
        step = replay(wavy, trajectory, index, GRID, sampler)
        x_next = trajectory.x_next[:, index]
        assert torch.equal(step.mean, trajectory.old_mean[:, index])
        assert torch.equal(step.sample(drawn[k]), x_next)
        old_mean = trajectory.old_mean[:, index]
        assert not LIKELIHOOD.log_ratio(step, old_mean, x_next).any()
        assert not LIKELIHOOD.kl(step, old_mean).any()
        assert step.std == sampler.std(GRID[k]) > 0


@pytest.mark.parametrize("shape", [(32,), (8, 4), (2, 1, 4, 4), (2, 4, 1, 4, 1)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_numbers_do_not_depend_on_the_rank(sampler, shape, reduction):
    """Latents of one to five axes instead of three: rollout, log-probabilities, divergences and
    replay are the same, bitwise, in the shape of the latents.

    Mutation: reduce over three axes whatever the rank.
    """
    likelihood = Likelihood(reduction=reduction, form="gaussian")
    stochastic = stochastic_of(sampler)
    found = []
    for axes in ((2, 4, 4), shape):

        def field(x, sigma, is_shared=False):
            return wavy(x.reshape(-1, 2, 4, 4), sigma).reshape(x.shape)

        def noise(k, axes=axes):
            return noises()[k].reshape(5, *axes)

        trajectory = rollout(
            field,
            draw(5, torch.float32)[0].reshape(5, *axes),
            GRID,
            sampler=sampler,
            stochastic=stochastic,
            noise=noise,
            shares_start=False,
        )
        count = len(stochastic)
        assert trajectory.x.shape == trajectory.old_mean.shape == (5, count, *axes)
        assert trajectory.x0.shape == (5, *axes)
        numbers = [trajectory.x0, trajectory.x_next]
        for index in range(count):
            step = replay(field, trajectory, index, GRID, sampler)
            assert torch.equal(step.mean, trajectory.old_mean[:, index])
            other = trajectory.x[:, index]
            x_next = trajectory.x_next[:, index]
            reduced = [
                likelihood.log_prob(step, x_next),
                likelihood.log_ratio(step, other, x_next),
                likelihood.kl(step, other),
                tv(step, other),
            ]
            assert all(value.shape == (5,) and value.all() for value in reduced)
            numbers += [step.mean, *reduced]
        found.append(numbers)
    for plain, shaped in zip(*found, strict=True):
        assert torch.equal(plain.flatten(), shaped.flatten())


def test_a_sample_does_not_depend_on_its_batch(sampler):
    """Nor on its place: one by one, in halves and reversed, bitwise. Mutation: a statistic of the
    batch.
    """
    x = draw(5, torch.float32)[0]
    stochastic = stochastic_of(sampler)
    whole = draw_rollout(sampler, x, noises(), stochastic)
    drawn = partial(draw_rollout, sampler, stochastic=stochastic)
    for rows in (slice(0, 1), slice(1, 5), torch.tensor([4, 3, 2, 1, 0])):
        some = drawn(x[rows], noises(rows))
        for name in ("x", "x_next", "old_mean", "x0"):
            assert torch.equal(getattr(some, name), getattr(whole, name)[rows]), name


def test_states_on_the_host_come_back_to_the_device_of_the_last_one():
    """The meta device stands for a GPU. On the CPU a trajectory is its own copy on the host.

    Mutation: hand out what is on the host.
    """
    states = torch.arange(12.0).reshape(2, 3, 2)
    here = Trajectory((0, 1, 2), False, states, states + 1, states + 2, states[:, 0])
    assert here.on_host() is here
    assert here.at("x_next", 2).tolist() == [[5.0, 6.0], [11.0, 12.0]]
    there = replace(here, x0=states[:, 0].to("meta"))
    assert there.at("old_mean", 1).device.type == "meta"
    assert there.at("old_mean", 1).shape == (2, 2)
