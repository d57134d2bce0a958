"""The simulation of the study, over the settings of its sweep.yaml: how each clip decides at its
best range, in each size, under other assumptions, and as published.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowrl.errors import UserError
from flowrl.schedule import Interval, LinearShift, intervals
from flowrl.studies.plan import Section
from flowrl.studies.ratio_noise.decisions import (
    Decisions,
    Estimator,
    best_clip,
    decide,
    estimators,
    noise,
    population,
    sampled,
    step_kls,
)

DELTAS = (1e-9, 2e-4)
BISECTIONS = 12
"""The threshold of a range is looked for between the first two, and their interval is halved so
often, which is finer than ranges are.

Beyond them a centred ratio has no best range: it clips half of all terms or nothing.
"""


@dataclass(frozen=True)
class Terms:
    """The trained steps, the rms of moved velocities, the KL of each step and velocity, and what
    the clip multiplies by at each step.

    All tensors are float64: `velocity` (quantiles,), `kl` (steps, quantiles), `scales` (steps, 1).
    """

    steps: Sequence[Interval]
    velocity: Tensor
    kl: Tensor
    scales: Tensor

    @classmethod
    def of(cls, estimator: Estimator, setting: Section) -> Terms:
        """Make the terms of a setting, which holds the grid (shift, num_steps, and how many of its
        first steps are trained), delta, spread, quantiles and growth.
        """
        grid = intervals(LinearShift(shift=setting["shift"]), setting["num_steps"])
        steps = grid[: setting["steps"]]
        growth = setting["growth"]
        velocity = population(
            estimator.sampler,
            steps,
            setting["delta"],
            setting["spread"],
            setting["quantiles"],
            growth,
        )
        kl = step_kls(estimator.sampler, steps, velocity, growth)
        scale_of_step = [estimator.scale(step) for step in steps]
        scales = torch.tensor(scale_of_step, dtype=torch.float64)
        return cls(steps, velocity, kl, scales[:, None])


def at_best(estimator: Estimator, setting: Section) -> tuple[float, Decisions]:
    """Return the best clip range in a setting's number of `dimensions`, and how it decides."""
    terms = Terms.of(estimator, setting)
    options = {
        "delta": setting["delta"],
        "is_centred": estimator.is_centred,
        "dimensions": setting["dimensions"],
    }
    clip = best_clip(terms.kl, terms.scales, **options)
    return clip, decide(terms.kl, terms.scales, clip=clip, **options)


def varied(spec: Section) -> list[dict[str, Any]]:
    """Return the contradicted decisions at other assumptions: other steps and sizes, velocities
    that grow to the data.
    """
    rows: list[dict[str, Any]] = []
    for estimator in estimators(spec["noise_levels"]):
        for variation in spec["variations"]:
            # A variation may be one of the dimensions, and so comes last.
            setting = {**spec, "dimensions": spec["varied_dimensions"], **variation}
            _, decisions = at_best(estimator, setting)
            row = {
                "label": estimator.label,
                **variation,
                "contradicted": decisions.contradicted,
                "gross": decisions.gross,
            }
            rows.append(row)
    return rows


def matching_delta(estimator: Estimator, setting: Section, clip: float) -> float:
    """Return the threshold whose best range is `clip`, to the grid of `best_clip`: how large a
    trust region it makes.

    Raises UserError for a range that is best for no threshold within DELTAS.
    """

    def best(delta: float) -> float:
        return at_best(estimator, {**setting, "delta": delta})[0]

    low, high = DELTAS
    # Bisection needs a range that rises with the threshold, from below `clip` to above it.
    if not best(low) < clip < best(high):
        raise UserError(
            f"clip={clip} of {estimator.label} is best for no delta from {low:g} to {high:g}"
        )
    for _ in range(BISECTIONS):
        # The interval spans five orders of magnitude, so it is halved on a logarithmic scale.
        middle = math.sqrt(low * high)
        is_above = best(middle) >= clip
        low, high = (low, middle) if is_above else (middle, high)
    return math.sqrt(low * high)


def published(spec: Section) -> list[dict[str, Any]]:
    """Return for published clip ranges the threshold that each comes to, and the range that comes
    to it in the embedded model.

    A threshold is of the KL per dimension, so velocities that move alike per dimension meet it in
    either model.
    """
    known = estimators(spec["noise_levels"])
    estimator_of = {estimator.label: estimator for estimator in known}
    # The model of the papers, in whose dimensions and on whose grid the ranges were published, and
    # the model that runs here.
    real = {**spec, **spec["published_on"]}
    embedded = {**spec, **spec["carried_to"]}
    rows: list[dict[str, Any]] = []
    for label, clip in spec["published"].items():
        estimator = estimator_of[label]
        delta = matching_delta(estimator, real, clip)
        _, there = at_best(estimator, {**real, "delta": delta})
        carried, here = at_best(estimator, {**embedded, "delta": delta})
        threshold = torch.tensor(delta, dtype=torch.float64)
        noise_there = float(noise(threshold, real["dimensions"]))
        row = {
            "label": label,
            "clip": clip,
            "delta": delta,
            "carried": carried,
            "noise": noise_there,
            "contradicted": there.contradicted,
            "gross": there.gross,
            "here": here.contradicted,
        }
        rows.append(row)
    return rows


def simulate(spec: Section) -> dict[str, Any]:
    """Compute what the study says without a model; `spec` is the `simulation` of its sweep.yaml.

    The result is plain JSON, as results.json keeps it.
    """
    by_dimensions: dict[str, list[dict[str, Any]]] = {}
    by_step: dict[str, list[dict[str, float]]] = {}
    for estimator in estimators(spec["noise_levels"]):
        # The last step of the grid ends at the image itself and is never trained on.
        terms = Terms.of(estimator, {**spec, "steps": spec["num_steps"] - 1})
        by_dimensions[estimator.label] = _in_each_size(estimator, terms, spec)
        by_step[estimator.label] = _at_each_step(estimator, terms)
    return {
        "setting": dict(spec),
        "at_threshold": _at_threshold(spec),
        "estimators": by_dimensions,
        "steps": by_step,
        "varied": varied(spec),
        "published": published(spec),
    }


def _at_threshold(spec: Section) -> list[dict[str, Any]]:
    """Return noise and signal of a step at the threshold in each size, the embedded model last."""
    delta = spec["delta"]
    threshold = torch.tensor(delta, dtype=torch.float64)
    rows: list[dict[str, Any]] = []
    for dimensions in spec["dimensions"]:
        std = float(noise(threshold, dimensions))
        rows.append({"dimensions": dimensions, "noise": std, "signal": delta})
    run_dimensions = spec["run_dimensions"]
    run_delta = spec["run_delta"]
    run_noise = math.sqrt(2 * run_delta / run_dimensions)
    rows.append({"dimensions": run_dimensions, "noise": run_noise, "signal": run_delta})
    return rows


def _in_each_size(estimator: Estimator, terms: Terms, spec: Section) -> list[dict[str, Any]]:
    """Return how an estimator decides in each number of dimensions: at the best range there, and at
    that of the first number.
    """
    options: dict[str, Any] = {"delta": spec["delta"], "is_centred": estimator.is_centred}
    # The range that is best in few dimensions, held fixed while the dimensions grow.
    first_dimensions = spec["dimensions"][0]
    first = best_clip(terms.kl, terms.scales, dimensions=first_dimensions, **options)
    rows = []
    for dimensions in spec["dimensions"]:
        options["dimensions"] = dimensions
        clip = best_clip(terms.kl, terms.scales, **options)
        decisions = decide(terms.kl, terms.scales, clip=clip, **options)
        carried = decide(terms.kl, terms.scales, clip=first, **options)
        row = {
            "dimensions": dimensions,
            "clip": clip,
            "contradicted": decisions.contradicted,
            "gross": decisions.gross,
            "false_alarms": decisions.false_alarms,
            "misses": decisions.misses,
            "carried": carried.contradicted,
        }
        # The closed form is checked by drawing where that is cheap. The training's diagnostics,
        # which draw it, know no centred ratio.
        if dimensions in spec["sampled_dimensions"] and not estimator.is_centred:
            row["sampled"] = sampled(
                estimator,
                terms.steps,
                terms.velocity,
                dimensions=dimensions,
                clip=clip,
                delta=spec["delta"],
                samples=spec["samples"],
                seed=spec["seed"],
            )
        rows.append(row)
    return rows


def _at_each_step(estimator: Estimator, terms: Terms) -> list[dict[str, float]]:
    """Return what the median difference of velocities means at each step."""
    # The quantiles are those of a log-normal, whose median is the geometric mean.
    median = terms.velocity.log().mean().exp()[None]
    kls = step_kls(estimator.sampler, terms.steps, median)[:, 0]
    rows = []
    for step, kl in zip(terms.steps, kls.tolist(), strict=True):
        row = {
            "sigma": step.sigma,
            "std": estimator.sampler.std(step),
            "kl": kl,
            "scale": estimator.scale(step),
        }
        rows.append(row)
    return rows
