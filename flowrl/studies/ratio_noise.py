"""Noise and signal of the log-ratio, and how often a clip decides otherwise than the exact
divergence, without a model.

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
from typing import Any

import torch
from torch import Tensor
from torch.special import ndtr

from flowrl.diagnostics import Diagnostics
from flowrl.errors import UserError
from flowrl.gaussian import GaussianStep, Likelihood
from flowrl.samplers.cps import CPS
from flowrl.samplers.protocol import Sampler
from flowrl.samplers.sde import FlowSDE
from flowrl.schedule import Interval, LinearShift, intervals
from flowrl.types import LossInputs

GROSS = 4.0
"""A contradicted decision is gross where the divergence is that many times below or above the
threshold.
"""
CHUNK = 2**22
"""Numbers drawn at a time."""
DELTAS = (1e-9, 2e-4)
BISECTIONS = 12
"""Thresholds among which that of a range is looked for, and how often their interval is halved:
finer than ranges are.

Beyond, the best range of a centred ratio is none: it clips half of all terms or nothing.
"""


@dataclass(frozen=True)
class Estimator:
    """A clip's view of a step; `form` is that of the log-probability it is taken from."""

    label: str
    sampler: Sampler
    form: str
    is_centred: bool

    def scale(self, interval: Interval) -> float:
        """c, by which the log-ratio is multiplied before the clip."""
        std = self.sampler.std(interval)
        return 2 * std**2 if self.form == "unnormalised" else std if self.is_centred else 1.0


@dataclass(frozen=True)
class Decisions:
    """Shares of the terms that move away from the old policy: dropped against the mask's word, kept
    against it.
    """

    false_alarms: float
    misses: float
    gross: float

    @property
    def contradicted(self) -> float:
        """Both."""
        return self.false_alarms + self.misses


def estimators(noise_levels: Mapping[str, float]) -> list[Estimator]:
    """Flow-GRPO, GRPO-Guard, and CPS steps with the Gaussian and the published log-probability."""
    sde = FlowSDE(noise_level=noise_levels["flow_sde"])
    cps = CPS(noise_level=noise_levels["cps"])
    return [
        Estimator("Flow-SDE, ratio (Flow-GRPO)", sde, "gaussian", False),
        Estimator("Flow-SDE, centred ratio (GRPO-Guard)", sde, "gaussian", True),
        Estimator("CPS, ratio", cps, "gaussian", False),
        Estimator("CPS, unnormalised ratio (Flow-CPS)", cps, "unnormalised", False),
    ]


def noise(kl: Tensor, dimensions: int) -> Tensor:
    """Standard deviation of the mean-reduced log-ratio of a step with the mean-reduced KL `kl`."""
    return (2 * kl / dimensions).sqrt()


def step_kls(
    sampler: Sampler, steps: Sequence[Interval], velocity: Tensor, growth: float = 1.0
) -> Tensor:
    """The KL of each step (rows) where the velocity moved by each rms (columns).

    Its square is `growth` times as large at the last step as at the first, geometrically between
    them.
    """
    sensitivity = torch.tensor(
        [(sampler.gain(own) / sampler.std(own)) ** 2 / 2 for own in steps], dtype=velocity.dtype
    )
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
    """Root mean squares of velocity differences of the first step at `count` even quantiles,
    log-normal.

    The KL's logarithm has standard deviation `spread`, and its mean over quantiles and steps is
    that of `delta`.
    """
    one = step_kls(sampler, steps, torch.ones(1, dtype=torch.float64), growth).log().mean()
    quantiles = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    return ((math.log(delta) - one + spread * quantiles) / 2).exp()


def decide(
    kl: Tensor, scales: Tensor, *, dimensions: int, clip: float, delta: float, is_centred: bool
) -> Decisions:
    """Closed form, over terms with the given KLs (steps, quantiles) and either sign of the
    advantage.

    The mask drops z above a (A > 0), or below it (A < 0), where KL >= delta; the clip above, or
    below, bounds of its own. Both are tails of one normal variable, so they differ by a difference
    of tails.
    """
    std = noise(kl, dimensions)
    shift = torch.zeros_like(kl) if is_centred else kl
    away = kl / std
    is_far = kl >= delta
    false_alarms = []
    misses = []
    gross = []
    for sign, bound in ((1.0, math.log1p(clip)), (-1.0, math.log1p(-clip))):
        clipped = ndtr(-sign * (bound / scales + shift) / std)
        masked = torch.where(is_far, ndtr(-sign * away), 0.0)
        wrong = clipped - masked
        false_alarms.append(wrong.clamp(min=0))
        misses.append((-wrong).clamp(min=0))
        is_gross = (kl < delta / GROSS) | (kl > delta * GROSS)
        gross.append(torch.where(is_gross, wrong.abs(), 0.0))
    # The signs are equally likely, and together they move away with probability 1: sums are shares
    # of such terms.
    return Decisions(*(float(sum(parts).mean()) for parts in (false_alarms, misses, gross)))  # type: ignore[union-attr]


def best_clip(
    kl: Tensor, scales: Tensor, *, dimensions: int, delta: float, is_centred: bool
) -> float:
    """The clip range that contradicts the mask least, on a logarithmic grid: a fair comparison
    takes this one.
    """
    middle = float(noise(torch.tensor(delta), dimensions) * scales.log().mean().exp())
    grid = [min(middle * 10 ** (n / 50), 0.9) for n in range(-150, 151)]
    options = {"dimensions": dimensions, "delta": delta, "is_centred": is_centred}
    return min(grid, key=lambda clip: decide(kl, scales, clip=clip, **options).contradicted)  # type: ignore[arg-type]


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
    """The share of contradicted decisions again, drawn: real steps, log-probabilities and
    diagnostics of training.
    """
    generator = torch.Generator().manual_seed(seed)
    likelihood = Likelihood(reduction="mean", form=estimator.form)  # type: ignore[arg-type]
    diagnose = Diagnostics(clip=clip, delta=delta)
    wrong = 0.0
    total = 0
    rows = max(1, CHUNK // dimensions)
    for interval in steps:
        for start in range(0, samples, rows):
            count = min(rows, samples - start)
            moved = velocity[torch.randint(len(velocity), (count,), generator=generator)]
            nowhere = torch.zeros(count, dimensions, 1, 1, dtype=torch.float64)
            old = GaussianStep(nowhere, estimator.sampler.std(interval))
            x_next = old.sample(
                torch.randn(old.mean.shape, generator=generator, dtype=torch.float64)
            )
            # Noise is the same in all directions, so one direction of the difference stands for
            # all.
            new = GaussianStep(
                old.mean + moved.view(-1, 1, 1, 1) * estimator.sampler.gain(interval), old.std
            )
            none = torch.zeros(count, dtype=torch.float64)
            advantage = torch.randint(2, (count,), generator=generator).double() * 2 - 1
            inputs = LossInputs(
                log_prob=likelihood.log_prob(new, x_next),
                old_log_prob=likelihood.log_prob(old, x_next),
                advantage=advantage,
                kl=likelihood.kl(new, old.mean),
                tv=none,
                velocity=none,
                std=old.std,
                dt=interval.dt,
                form=estimator.form,
                reduction="mean",
                dimensions=dimensions,
            )
            found = diagnose(inputs, 0)
            wrong += float(found["trust/clip_false_alarms"] + found["trust/clip_misses"]) * count
            total += count
    return 2 * wrong / total  # about half of all terms move away


def moved(
    estimator: Estimator, given: Mapping[str, Any]
) -> tuple[Sequence[Interval], Tensor, Tensor, Tensor]:
    """Trained steps, rms of moved velocities, the KL of each step and velocity, and what the clip
    multiplies by.

    `given` holds the grid (shift, num_steps, and how many of its first steps are trained), delta,
    spread, quantiles and growth.
    """
    steps = intervals(LinearShift(shift=given["shift"]), given["num_steps"])[: given["steps"]]
    shape = given["delta"], given["spread"], given["quantiles"], given["growth"]
    velocity = population(estimator.sampler, steps, *shape)
    scales = torch.tensor([estimator.scale(own) for own in steps], dtype=torch.float64)[:, None]
    return steps, velocity, step_kls(estimator.sampler, steps, velocity, given["growth"]), scales


def at_best(estimator: Estimator, given: Mapping[str, Any]) -> tuple[float, Decisions]:
    """The best clip range in so many `dimensions`, and how it decides."""
    _, _, kl, scales = moved(estimator, given)
    options = {
        "delta": given["delta"],
        "is_centred": estimator.is_centred,
        "dimensions": given["dimensions"],
    }
    clip = best_clip(kl, scales, **options)
    return clip, decide(kl, scales, clip=clip, **options)


def varied(spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Contradicted decisions at other assumptions: other steps and sizes, velocities that grow to
    the data.
    """
    rows: list[dict[str, Any]] = []
    for estimator in estimators(spec["noise_levels"]):
        for given in spec["variations"]:
            _, own = at_best(estimator, {**spec, "dimensions": spec["varied_dimensions"], **given})
            rows.append(
                {
                    "label": estimator.label,
                    **given,
                    "contradicted": own.contradicted,
                    "gross": own.gross,
                }
            )
    return rows


def matching_delta(estimator: Estimator, given: Mapping[str, Any], clip: float) -> float:
    """The threshold whose best range is `clip`, to the grid of `best_clip`: how large a trust
    region it makes.

    Raises UserError for a range that is best for no threshold within DELTAS.
    """
    low, high = DELTAS
    if (
        not at_best(estimator, {**given, "delta": low})[0]
        < clip
        < at_best(estimator, {**given, "delta": high})[0]
    ):
        raise UserError(
            f"clip={clip} of {estimator.label} is best for no delta from {low:g} to {high:g}"
        )
    for _ in range(BISECTIONS):
        middle = math.sqrt(low * high)
        is_above = at_best(estimator, {**given, "delta": middle})[0] >= clip
        low, high = (low, middle) if is_above else (middle, high)
    return math.sqrt(low * high)


def published(spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Published clip ranges: the threshold that each comes to, and the range that comes to it in
    the embedded model.

    A threshold is of the KL per dimension, so velocities that move alike per dimension meet it in
    either model.
    """
    known = {own.label: own for own in estimators(spec["noise_levels"])}
    rows: list[dict[str, Any]] = []
    real, embedded = ({**spec, **spec[key]} for key in ("published_on", "carried_to"))
    for label, clip in spec["published"].items():
        delta = matching_delta(known[label], real, clip)
        _, there = at_best(known[label], {**real, "delta": delta})
        carried, here = at_best(known[label], {**embedded, "delta": delta})
        row = {"label": label, "clip": clip, "delta": delta, "carried": carried}
        row |= {"noise": float(noise(torch.tensor(delta, dtype=torch.float64), real["dimensions"]))}
        rows.append(
            row
            | {"contradicted": there.contradicted, "gross": there.gross, "here": here.contradicted}
        )
    return rows


def simulate(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What the study computes without a model; `spec` is the `simulation` of its sweep.yaml."""
    delta, threshold = spec["delta"], torch.tensor(spec["delta"], dtype=torch.float64)
    at_threshold = [
        {"dimensions": own, "noise": float(noise(threshold, own)), "signal": delta}
        for own in spec["dimensions"]
    ]
    found: dict[str, list[dict[str, Any]]] = {}
    by_step: dict[str, list[dict[str, float]]] = {}
    for estimator in estimators(spec["noise_levels"]):
        steps, velocity, kl, scales = moved(estimator, {**spec, "steps": spec["num_steps"] - 1})
        options: dict[str, Any] = {"delta": delta, "is_centred": estimator.is_centred}
        first = best_clip(kl, scales, dimensions=spec["dimensions"][0], **options)
        rows = found[estimator.label] = []
        for dimensions in spec["dimensions"]:
            clip = best_clip(kl, scales, dimensions=dimensions, **options)
            own = decide(kl, scales, dimensions=dimensions, clip=clip, **options)
            carried = decide(kl, scales, dimensions=dimensions, clip=first, **options)
            row = {
                "dimensions": dimensions,
                "clip": clip,
                "contradicted": own.contradicted,
                "gross": own.gross,
            }
            row |= {
                "false_alarms": own.false_alarms,
                "misses": own.misses,
                "carried": carried.contradicted,
            }
            if dimensions in spec["sampled_dimensions"] and not estimator.is_centred:
                drawn = {
                    "samples": spec["samples"],
                    "seed": spec["seed"],
                    "clip": clip,
                    "delta": delta,
                }
                row["sampled"] = sampled(estimator, steps, velocity, dimensions=dimensions, **drawn)
            rows.append(row)
        middle = velocity.log().mean().exp()[None]
        by_step[estimator.label] = [
            {
                "sigma": own.sigma,
                "std": estimator.sampler.std(own),
                "kl": float(each),
                "scale": estimator.scale(own),
            }
            for own, each in zip(
                steps, step_kls(estimator.sampler, steps, middle)[:, 0], strict=True
            )
        ]
    at_threshold.append(
        {
            "dimensions": spec["run_dimensions"],
            "noise": math.sqrt(2 * spec["run_delta"] / spec["run_dimensions"]),
        }
        | {"signal": spec["run_delta"]}
    )
    found_by = {
        "at_threshold": at_threshold,
        "estimators": found,
        "steps": by_step,
        "varied": varied(spec),
    }
    return {"setting": dict(spec)} | found_by | {"published": published(spec)}
