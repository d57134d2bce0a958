"""Means over seeds with bootstrap intervals, and differences, paired where seeds are shared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` seeds, with the bounds of its 95 % interval: NaN from fewer than two seeds."""

    mean: float
    low: float
    high: float
    count: int
    is_paired: bool = False

    def text(self, sign: bool = False) -> str:
        """For reading: mean and interval, `-` for nothing."""
        if math.isnan(self.mean):
            return "-"
        form = "+.3g" if sign else ".3g"
        mean = format(self.mean, form)
        return mean if math.isnan(self.low) else f"{mean} [{self.low:{form}}, {self.high:{form}}]"


def mean(values: Sequence[float]) -> Estimate:
    """The mean of one value a seed, with its percentile bootstrap interval over seeds."""
    if len(values) < 2:
        return Estimate(values[0] if values else math.nan, math.nan, math.nan, len(values))
    return _estimate(_resampled(np.asarray(values), 0), float(np.mean(values)), len(values))


def difference(values: Mapping[str, float], baseline: Mapping[str, float]) -> Estimate:
    """`values` minus `baseline`, both by seed: over shared seeds as pairs, if there are two or more.

    Otherwise the two means are resampled apart; with a single seed on either side there is no interval.
    """
    shared = [seed for seed in values if seed in baseline]
    if len(shared) > 1 or len(values) == len(baseline) == len(shared) == 1:
        paired = mean([values[seed] - baseline[seed] for seed in shared])
        return Estimate(paired.mean, paired.low, paired.high, paired.count, is_paired=True)
    ours, theirs = list(values.values()), list(baseline.values())
    if not ours or not theirs:
        return Estimate(math.nan, math.nan, math.nan, 0)
    gap, count = float(np.mean(ours) - np.mean(theirs)), min(len(ours), len(theirs))
    if count < 2:
        return Estimate(gap, math.nan, math.nan, count)
    return _estimate(_resampled(np.asarray(ours), 0) - _resampled(np.asarray(theirs), 1), gap, count)


def ratio(values: Mapping[str, float], baseline: Mapping[str, float]) -> Estimate:
    """The mean of `values` over that of `baseline`, on shared seeds, which are resampled as pairs.

    NaN where a mean of the baseline is not positive: a ratio would mean nothing.
    """
    shared = [seed for seed in values if seed in baseline]
    if not shared or (below := float(np.mean([baseline[seed] for seed in shared]))) <= 0:
        return Estimate(math.nan, math.nan, math.nan, len(shared))
    ours, theirs = (np.asarray([own[seed] for seed in shared]) for own in (values, baseline))
    centre = float(ours.mean()) / below
    if len(shared) < 2:
        return Estimate(centre, math.nan, math.nan, 1)
    below_resampled = _resampled(theirs, 0)
    if below_resampled.min() <= 0:
        return Estimate(centre, math.nan, math.nan, len(shared), is_paired=True)
    found = _estimate(_resampled(ours, 0) / below_resampled, centre, len(shared))
    return Estimate(found.mean, found.low, found.high, found.count, is_paired=True)


def _resampled(values: np.ndarray, stream: int) -> np.ndarray:
    rows = np.random.default_rng(stream).integers(len(values), size=(RESAMPLES, len(values)))
    return values[rows].mean(1)


def _estimate(means: np.ndarray, centre: float, count: int) -> Estimate:
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(centre, float(low), float(high), count)
