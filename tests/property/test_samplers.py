import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowrl.rollout import replay, rollout
from flowrl.samplers.cps import CPS
from flowrl.samplers.ode import ODE
from flowrl.samplers.sde import DanceSDE, FlowSDE
from flowrl.schedule import LinearShift, intervals

NOISY = (FlowSDE, DanceSDE, CPS)
SAMPLERS = (FlowSDE(noise_level=0.7), DanceSDE(noise_level=0.3), CPS(noise_level=0.8))
by_sampler = pytest.mark.parametrize(
    "sampler", SAMPLERS, ids=lambda sampler: type(sampler).__name__
)
levels = st.floats(0.0, 1.0)


@st.composite
def a_step(draw):
    """(x, velocity, interval) in float64 at any sigma of any grid, its first value 1 included."""
    step = draw(
        st.sampled_from(
            intervals(LinearShift(shift=draw(st.floats(0.3, 5.0))), draw(st.integers(2, 12)))
        )
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x, velocity = (
        torch.randn(2, 1, 2, 3, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    return x, velocity, step


@pytest.mark.parametrize("kind", NOISY)
@given(step=a_step())
def test_without_noise_every_sampler_is_euler(kind, step):
    """Mutation: a sign in any mean, sigma for sigma_next in CPS."""
    got, euler = kind(noise_level=0.0).step(*step), ODE().step(*step)
    torch.testing.assert_close(got.mean, step[0] + step[1] * step[2].dt, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got.mean, euler.mean, rtol=1e-10, atol=1e-10)
    assert got.std == euler.std == 0


@pytest.mark.parametrize("kind", NOISY)
@given(step=a_step(), noise_level=levels)
def test_gain_is_the_derivative_of_the_mean(kind, step, noise_level):
    """Also the ODE's. Mutation: any term of a gain, which then no longer carries velocity distances
    over to means.
    """
    x, velocity, interval = step
    for sampler in (kind(noise_level=noise_level), ODE()):
        moved = (
            sampler.step(x, velocity + 1, interval).mean - sampler.step(x, velocity, interval).mean
        )
        assert moved.flatten().tolist() == pytest.approx(
            [sampler.gain(interval)] * x.numel(), rel=1e-9, abs=1e-12
        )


@given(step=a_step(), noise_level=levels)
def test_cps_keeps_the_total_noise(step, noise_level):
    """std^2 + kept^2 = sigma_next^2, with kept read off the mean. Mutation: sin without pi / 2."""
    x, _, interval = step
    # x = -sigma, v = -1 is x0_hat = 0, eps_hat = -1.
    ones = torch.ones_like(x)
    got = CPS(noise_level=noise_level).step(-interval.sigma * ones, -ones, interval)
    kept = -got.mean.flatten()[0].item()
    assert got.std**2 + kept**2 == pytest.approx(interval.sigma_next**2, rel=1e-10, abs=1e-12)
    data = CPS(noise_level=noise_level).step((1 - interval.sigma) * ones, -ones, interval)
    assert data.mean.flatten()[0].item() == pytest.approx(
        1 - interval.sigma_next, rel=1e-10, abs=1e-12
    )


@given(step=a_step(), noise_level=levels)
def test_flow_sde_with_constant_diffusion_is_dance_sde(step, noise_level):
    """Mutation: let one of them use another drift."""
    sampler = FlowSDE(noise_level=noise_level)
    dance, flow = DanceSDE(noise_level=sampler.diffusion(step[2])).step(*step), sampler.step(*step)
    assert torch.equal(dance.mean, flow.mean)
    assert (dance.std, sampler.std(step[2])) == (flow.std, flow.std)


def wavy(x, sigma, is_shared=False):
    """A velocity field whose last bits depend on the order of operations."""
    return torch.sin(3 * x) * sigma + x.flip(-1) / 3


@by_sampler
def test_steps_outside_the_choice_are_euler(sampler):
    """Mutation: use the sampler's mean without noise there."""
    grid, x = intervals(LinearShift(shift=3.0), 4), torch.ones(1, 1, 2, 2)

    def noise(k):
        return torch.full_like(x, float(k))

    options = {"sampler": sampler, "noise": noise, "shares_start": False}
    got = rollout(wavy, x, grid, stochastic=(1,), **options)
    expected = x
    for k, step in enumerate(grid):
        gaussian = (sampler if k == 1 else ODE()).step(expected, wavy(expected, step.sigma), step)
        expected = gaussian.sample(noise(k)) if k == 1 else gaussian.mean
    assert torch.equal(got.x0, expected)
    nothing = rollout(wavy, x, grid, stochastic=(), **options)
    assert nothing.steps == ()
    assert not torch.equal(nothing.x0, got.x0)


@pytest.mark.parametrize("shares_start", [True, False])
def test_rows_are_shared_until_the_first_noise(shares_start):
    """Replay makes the promise that the rollout made at the same step. Mutation: promise it one
    step too long.
    """
    told = []

    def velocity(x, sigma, is_shared):
        told.append(is_shared)
        return -x

    grid, x = intervals(LinearShift(shift=3.0), 5), torch.ones(2, 1, 2, 2)
    options = {
        "sampler": CPS(noise_level=0.7),
        "noise": lambda k: torch.ones_like(x),
    }
    trajectory = rollout(velocity, x, grid, stochastic=(1, 3), shares_start=shares_start, **options)
    assert told == [shares_start, shares_start, False, False, False]
    for index in (0, 1):
        replay(velocity, trajectory, index, grid, CPS(noise_level=0.7))
    assert told[5:] == [shares_start, False]


@by_sampler
def test_steps_may_draw_noise_without_being_kept(sampler):
    """Noise in steps 0, 1 and 3, of which 1 and 3 are trained: the samples are those of a rollout
    that keeps all, and what is kept are its later two steps, whose rows are no longer equal.

    Mutation: draw no noise at untrained steps, or keep them, too, or replay as if rows were equal.
    """
    grid, x = intervals(LinearShift(shift=3.0), 5), torch.ones(2, 1, 2, 2)

    def noise(k):
        return torch.full_like(x, float(k) + 1)

    options = {"sampler": sampler, "noise": noise, "shares_start": True}
    whole = rollout(wavy, x, grid, stochastic=(0, 1, 3), **options)
    part = rollout(wavy, x, grid, stochastic=(0, 1, 3), trained=(1, 3), **options)
    assert torch.equal(part.x0, whole.x0)
    assert whole.steps == (0, 1, 3) and part.steps == (1, 3)
    assert whole.shares_start and not part.shares_start
    for name in ("x", "x_next", "old_mean"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[:, 1:])
    nothing = rollout(wavy, x, grid, stochastic=(0, 1), trained=(), **options)
    assert nothing.steps == () and nothing.x.shape == (2, 0, 1, 2, 2)


M, S = 0.7, 0.5


def exact_velocity(x, sigma, is_shared=False):
    """E[eps - x0 | x_sigma = x] for data N(M, S^2)."""
    residual = (x - (1 - sigma) * M) / ((1 - sigma) ** 2 * S**2 + sigma**2)
    return sigma * residual - M - (1 - sigma) * S**2 * residual


def marginal(sampler, num_steps):
    """Mean and variance of the end of a rollout, from the affine map that each step is under
    `exact_velocity`.
    """
    mean, var, probe = 0.0, 1.0, torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1)
    for interval in intervals(LinearShift(shift=3.0), num_steps):
        step = sampler.step(probe, exact_velocity(probe, interval.sigma), interval)
        offset, end = step.mean.flatten().tolist()
        mean, var = offset + (end - offset) * mean, (end - offset) ** 2 * var + step.std**2
    return mean, var


# CPS with a fixed noise level renews a fixed share of the noise at every step, however small: only
# a level that falls like 1 / sqrt(K) has a limit.
CONVERGENT = {
    "flow_sde": (lambda num_steps: FlowSDE(noise_level=0.7), 0.005),
    "dance_sde": (lambda num_steps: DanceSDE(noise_level=0.3), 0.01),
    "cps": (lambda num_steps: CPS(noise_level=0.8 / math.sqrt(num_steps)), 0.01),
    "ode": (lambda num_steps: ODE(), 0.01),
}


@pytest.mark.parametrize("name", CONVERGENT)
def test_gaussian_data_keep_their_marginal(name):
    """The mean at once, the variance as K grows. Mutation: flip the drift's sign, halve g^2, std
    without sqrt(-dt).
    """
    build, tolerance = CONVERGENT[name]
    errors = []
    for num_steps in (10, 40, 160):
        mean, var = marginal(build(num_steps), num_steps)
        assert mean == pytest.approx(M, abs=1e-12)
        errors.append(abs(var - S**2))
    assert errors[0] > 2.5 * errors[1] > 6 * errors[2]
    assert errors[2] < tolerance


@given(step=a_step(), noise_level=levels)
def test_cps_loses_what_x0_hat_does_not_know(step, noise_level):
    """One step from the exact marginal: x0_hat and eps_hat carry (1-s) S^2 / V and s / V of x's
    deviation.

    Mutation: any coefficient of CPS; with a sure x0_hat (S = 0) the variance is sigma_next^2
    exactly.
    """
    interval = step[2]
    sigma, sigma_next = interval.sigma, interval.sigma_next
    var = (1 - sigma) ** 2 * S**2 + sigma**2
    probe = torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1)
    got = CPS(noise_level=noise_level).step(probe, exact_velocity(probe, sigma), interval)
    offset, end = got.mean.flatten().tolist()
    kept = sigma_next * math.cos(noise_level * math.pi / 2)
    slope = ((1 - sigma_next) * (1 - sigma) * S**2 + kept * sigma) / var
    assert end - offset == pytest.approx(slope, rel=1e-9, abs=1e-12)
    assert offset + slope * (1 - sigma) * M == pytest.approx(
        (1 - sigma_next) * M, rel=1e-9, abs=1e-12
    )


@by_sampler
def test_sampled_rollout_has_the_computed_marginal(sampler):
    """20,000 rollouts against the affine recursion, within 5 standard errors. Mutation: reuse one
    step's noise.
    """
    count, generator = 20_000, torch.Generator().manual_seed(0)
    x, *noise = (
        torch.randn(count, 1, 1, 1, generator=generator, dtype=torch.float64) for _ in range(11)
    )
    grid = intervals(LinearShift(shift=3.0), 10)
    options = {
        "sampler": sampler,
        "stochastic": range(10),
        "noise": noise.__getitem__,
        "shares_start": False,
    }
    x0 = rollout(exact_velocity, x, grid, **options).x0
    mean, var = marginal(sampler, 10)
    assert x0.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(var / count))
    assert x0.var().item() == pytest.approx(var, rel=5 * math.sqrt(2 / count))
