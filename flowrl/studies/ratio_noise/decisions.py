"""Noise and signal of the log-ratio, and the share of a clip's decisions that the exact divergence
contradicts, computed without a model.

A step N(mean, std^2 I) in D dimensions whose velocity moved by a given amount, of root mean square
u per dimension, has d = gain u and, mean-reduced, KL kappa = d^2 / (2 std^2). Its log-ratio is

    log r = sqrt(2 kappa / D) z - kappa,    z standard normal

(Flow-DPPO, arXiv 2606.11025, its section on ratio clipping): noise that shrinks with D over a
signal that does not. What is clipped is c log r, or c (log r + kappa) where it is centred: c = 1
for Flow-GRPO, 2 std^2 for Flow-CPS's unnormalised log-probability, std and centred for GRPO-Guard.
All of it is a question of normal tails.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.special import ndtr

from flowrl.diagnostics import Diagnostics
from flowrl.gaussian import GaussianStep, Likelihood, broadcast
from flowrl.samplers.cps import CPS
from flowrl.samplers.protocol import Sampler
from flowrl.samplers.sde import FlowSDE
from flowrl.schedule import Interval
from flowrl.types import LogProbForm, LossInputs

GROSS = 4.0
"""A contradicted decision is gross where the divergence is that many times below or above the
threshold.
"""
CHUNK = 2**22
"""Numbers drawn at a time."""


@dataclass(frozen=True)
class Estimator:
    """A clip's view of a step; `form` is that of the log-probability it is taken from.

    `is_centred` says that the KL is added to the log-ratio before the clip, which makes its mean 0.
    """

    label: str
    sampler: Sampler
    form: LogProbForm
    is_centred: bool

    def scale(self, interval: Interval) -> float:
        """Return c, by which the log-ratio is multiplied before the clip."""
        std = self.sampler.std(interval)
        if self.form == "unnormalised":
            return 2 * std**2
        return std if self.is_centred else 1.0


@dataclass(frozen=True)
class Decisions:
    """Shares of the terms that move away from the old policy: `false_alarms` are dropped against
    the mask's word, `misses` kept against it, and `gross` are those of either that are far from the
    threshold.
    """

    false_alarms: float
    misses: float
    gross: float

    @property
    def contradicted(self) -> float:
        """The share of the terms that are decided otherwise than by the mask, in either way."""
        return self.false_alarms + self.misses


def estimators(noise_levels: Mapping[str, float]) -> list[Estimator]:
    """Return Flow-GRPO, GRPO-Guard, and CPS steps with the Gaussian and the published
    log-probability.
    """
    sde = FlowSDE(noise_level=noise_levels["flow_sde"])
    cps = CPS(noise_level=noise_levels["cps"])
    return [
        Estimator("Flow-SDE, ratio (Flow-GRPO)", sde, "gaussian", False),
        Estimator("Flow-SDE, centred ratio (GRPO-Guard)", sde, "gaussian", True),
        Estimator("CPS, ratio", cps, "gaussian", False),
        Estimator("CPS, unnormalised ratio (Flow-CPS)", cps, "unnormalised", False),
    ]


def noise(kl: Tensor, dimensions: int) -> Tensor:
    """Return the standard deviation of the mean-reduced log-ratio of a step with the mean-reduced
    KL `kl`.
    """
    return (2 * kl / dimensions).sqrt()


def step_kls(
    sampler: Sampler, steps: Sequence[Interval], velocity: Tensor, growth: float = 1.0
) -> Tensor:
    """Return the KL of each step (rows) where the velocity moved by each rms (columns).

    Its square is `growth` times as large at the last step as at the first, geometrically between
    them.
    """
    # The KL of a step whose velocity moved by 1: d^2 / (2 std^2) with d = gain.
    kl_of_one = [(sampler.gain(step) / sampler.std(step)) ** 2 / 2 for step in steps]
    sensitivity = torch.tensor(kl_of_one, dtype=velocity.dtype)
    grown = torch.logspace(0, math.log10(growth), len(steps), dtype=velocity.dtype)
    return (sensitivity * grown)[:, None] * velocity.square()


def population(
    sampler: Sampler,
    steps: Sequence[Interval],
    delta: float,
    spread: float,
    count: int,
    growth: float = 1.0,
) -> Tensor:
    """Return the root mean squares of velocity differences of the first step at `count` even
    quantiles, log-normal.

    The KL's logarithm has standard deviation `spread`, and its mean over quantiles and steps is
    that of `delta`.
    """
    unit = torch.ones(1, dtype=torch.float64)
    one = step_kls(sampler, steps, unit, growth).log().mean()
    # The middles of `count` equal shares, so that neither end is infinite.
    shares = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    quantiles = torch.special.ndtri(shares)
    # The KL grows as the velocity's square, so half its logarithm is the velocity's.
    log_square = math.log(delta) - one + spread * quantiles
    return (log_square / 2).exp()


def decide(
    kl: Tensor, scales: Tensor, *, dimensions: int, clip: float, delta: float, is_centred: bool
) -> Decisions:
    """Compute in closed form how a clip decides, over terms with the given KLs (steps, quantiles)
    and either sign of the advantage.

    `scales` (steps, 1) is what the clip multiplies the log-ratio by. The mask drops z above a (A >
    0), or below it (A < 0), where KL >= delta; the clip above, or below, bounds of its own. Both
    are tails of one normal variable, so they differ by a difference of tails.
    """
    std = noise(kl, dimensions)
    shift = torch.zeros_like(kl) if is_centred else kl
    # The z beyond which the log-ratio, std z - kl, is positive: there the new policy is the
    # likelier one.
    away = kl / std
    is_far = kl >= delta
    is_gross = (kl < delta / GROSS) | (kl > delta * GROSS)
    false_alarms = torch.zeros_like(kl)
    misses = torch.zeros_like(kl)
    gross = torch.zeros_like(kl)
    # The signs of the advantage, each with the bound on the side to which it pushes the ratio.
    for sign, bound in ((1.0, math.log1p(clip)), (-1.0, math.log1p(-clip))):
        z_at_bound = (bound / scales + shift) / std
        clipped = ndtr(-sign * z_at_bound)
        masked = torch.where(is_far, ndtr(-sign * away), 0.0)
        wrong = clipped - masked
        false_alarms += wrong.clamp(min=0)
        misses += (-wrong).clamp(min=0)
        gross += torch.where(is_gross, wrong.abs(), 0.0)
    # The signs are equally likely, and together they move away with probability 1: sums are shares
    # of such terms.
    return Decisions(
        false_alarms=float(false_alarms.mean()),
        misses=float(misses.mean()),
        gross=float(gross.mean()),
    )


def best_clip(
    kl: Tensor, scales: Tensor, *, dimensions: int, delta: float, is_centred: bool
) -> float:
    """Return the clip range that contradicts the mask least, on a logarithmic grid: a fair
    comparison takes this one.
    """

    def contradicted(clip: float) -> float:
        decisions = decide(
            kl, scales, dimensions=dimensions, clip=clip, delta=delta, is_centred=is_centred
        )
        return decisions.contradicted

    # Three orders of magnitude either side of the noise that a step at the threshold has. A range
    # of 1 has no bound below, so 0.9 is the widest.
    noise_at_threshold = noise(torch.tensor(delta), dimensions)
    middle = float(noise_at_threshold * scales.log().mean().exp())
    grid = [min(middle * 10 ** (n / 50), 0.9) for n in range(-150, 151)]
    return min(grid, key=contradicted)


def sampled(
    estimator: Estimator,
    steps: Sequence[Interval],
    velocity: Tensor,
    *,
    dimensions: int,
    clip: float,
    delta: float,
    samples: int,
    seed: int,
) -> float:
    """Draw the share of contradicted decisions again, with real steps, and with the
    log-probabilities and diagnostics of training.

    `samples` steps are drawn at each of `steps`, whose velocity moved by one of the rms in
    `velocity` (quantiles,).
    """
    generator = torch.Generator().manual_seed(seed)
    diagnose = Diagnostics(clip=clip, delta=delta)
    wrong = 0.0
    total = 0
    # Drawn in chunks, since a sample may have a million dimensions.
    rows = max(1, CHUNK // dimensions)
    for interval in steps:
        for start in range(0, samples, rows):
            count = min(rows, samples - start)
            picked = torch.randint(len(velocity), (count,), generator=generator)
            moves = velocity[picked]
            inputs = _drawn(estimator, interval, moves, dimensions, generator)
            metrics = diagnose(inputs, 0)
            share = metrics["trust/clip_false_alarms"] + metrics["trust/clip_misses"]
            wrong += float(share) * count
            total += count
    return 2 * wrong / total  # about half of all terms move away


def _drawn(
    estimator: Estimator,
    interval: Interval,
    moves: Tensor,
    dimensions: int,
    generator: torch.Generator,
) -> LossInputs:
    """Draw a step for each rms of `moves`, and the sign of its advantage, as the loss would see
    them.
    """
    count = len(moves)
    likelihood = Likelihood(reduction="mean", form=estimator.form)
    nowhere = torch.zeros(count, dimensions, 1, 1, dtype=torch.float64)
    old = GaussianStep(nowhere, estimator.sampler.std(interval))
    standard_noise = torch.randn(old.mean.shape, generator=generator, dtype=torch.float64)
    x_next = old.sample(standard_noise)
    # Noise is the same in all directions, so one direction of the difference stands for all.
    shift = broadcast(moves, nowhere) * estimator.sampler.gain(interval)
    new = GaussianStep(old.mean + shift, old.std)
    # The shares that are read of the diagnostics depend on neither total variation nor velocity.
    none = torch.zeros(count, dtype=torch.float64)
    zero_or_one = torch.randint(2, (count,), generator=generator).double()
    advantage = zero_or_one * 2 - 1
    return LossInputs(
        log_prob=likelihood.log_prob(new, x_next),
        old_log_prob=likelihood.log_prob(old, x_next),
        advantage=advantage,
        kl=likelihood.kl(new, old.mean),
        tv=none,
        velocity_change=none,
        std=old.std,
        dt=interval.dt,
        form=estimator.form,
        reduction="mean",
        dimensions=dimensions,
    )
