"""Means with bootstrap intervals, over prompts within an evaluation and over seeds between runs.
NumPy and SciPy alone.

The images of one prompt are not independent, so prompts are resampled, not images: an image more
for the same prompts must not shrink an interval as a prompt more does. Nor must a line more with
the same prompt.

A percentile interval of few values is too narrow: it takes a variance over n where n - 1 is right,
and a normal's quantile for Student's. Hesterberg's expanded percentiles (2015, arXiv 1411.5279)
mend both and are the usual ones for many values: of 5 normal values 95 % intervals cover 92 % of
the time, not 84 %. Of fewer no resampling covers more than their range, 75 % for 3, so a mean has
Student's interval there, and a ratio or an unpaired difference none. Two values have none either:
Student's would be 13 standard errors either side.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.special import ndtr, stdtrit

RESAMPLES = 10_000
BLOCK = 500
"""Resamples are drawn so many at once, which bounds memory."""
LEVEL = 0.95
"""The share of intervals that hold the true mean."""
FEWEST = 5
"""The fewest values that are resampled for an interval."""
ROUNDING = 1e-6
"""The share of a value up to which a difference is shown as 0; float32 rounds a tenth of it."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over `count` prompts or seeds, and the bounds of its 95 % interval: NaN from fewer
    than three.
    """

    mean: float
    low: float
    high: float
    count: int
    is_paired: bool = False

    def text(self, sign: bool = False) -> str:
        """Return mean and interval for a reader, `-` for nothing."""
        if math.isnan(self.mean):
            return "-"
        form = "+.3g" if sign else ".3g"
        mean = format(self.mean, form)
        return mean if math.isnan(self.low) else f"{mean} [{self.low:{form}}, {self.high:{form}}]"


def interval_kinds(counts: Iterable[int], noun: str) -> str:
    """Say which intervals means over so many prompts or seeds have."""
    known = {count for count in counts if count}
    resampled = {count for count in known if count >= FEWEST}
    if resampled == known:
        return "95 % bootstrap intervals"
    if max(known) < 3:
        return f"no intervals, since there are fewer than 3 {noun}"
    if resampled:
        return f"95 % intervals: bootstrap, of 3 or 4 {noun} Student's"
    return f"95 % Student's intervals, since there are fewer than {FEWEST} {noun}"


def average(values: Sequence[float]) -> float:
    """Return the plain mean of one or more values, without an interval."""
    return sum(values) / len(values)


def mean(
    values: Sequence[float] | Float[np.ndarray, "N"], clusters: Int[np.ndarray, "N"] | None = None
) -> Estimate:
    """Return the mean of one value a prompt or seed, NaN left out, with its bootstrap interval; of
    3 or 4 values with Student's.

    Values of one number in `clusters` are not independent: the clusters are counted and resampled,
    each with all of its values, and the mean stays that of the values. Without `clusters` each
    value is independent of all others. Resampling is seeded, so equal values give equal intervals.
    """
    numbers = np.asarray(values, dtype=np.float64)
    is_known = ~np.isnan(numbers)
    known = numbers[is_known]
    if not len(known):
        return Estimate(math.nan, math.nan, math.nan, 0)
    centre = float(known.mean())
    members = np.arange(len(known))
    if clusters is not None:
        members = np.unique(clusters[is_known], return_inverse=True)[1]
    # A cluster enters by its sum and its number of values: the mean of values stays a ratio of two
    # sums, however unequal the clusters are.
    totals = np.bincount(members, known)
    sizes = np.bincount(members)
    count = len(sizes)
    if count < 3:
        return Estimate(centre, math.nan, math.nan, count)
    if count < FEWEST:
        # The spread of a ratio of two sums; for clusters of one value that of their mean.
        squares = float(np.square(totals - centre * sizes).sum())
        half = _student(count) * math.sqrt(squares * count / (count - 1)) / len(known)
        return Estimate(centre, centre - half, centre + half, count)
    return _estimate(_resampled(totals, 0, sizes), centre, count)


def geometric_mean(ratios: Sequence[float]) -> Estimate:
    """Return the geometric mean of positive ratios, one a seed, with the interval of `mean` on
    their logarithms, so that exchanging the two sides inverts the result.
    """
    log_mean = mean([math.log(ratio) for ratio in ratios])
    return Estimate(
        mean=math.exp(log_mean.mean),
        low=math.exp(log_mean.low),
        high=math.exp(log_mean.high),
        count=log_mean.count,
        is_paired=True,
    )


def difference(values: Mapping[str, float], baseline: Mapping[str, float]) -> Estimate:
    """Return `values` minus `baseline`, both by seed: over shared seeds as pairs, if there are two
    or more.

    Otherwise the two means are resampled apart; with fewer than five on either side there is no
    interval.
    """
    # A pair takes out what its seed does to both; one pair has no spread, unless there is no more.
    shared = [seed for seed in values if seed in baseline]
    if len(shared) > 1 or len(values) == len(baseline) == len(shared) == 1:
        paired = mean([values[seed] - baseline[seed] for seed in shared])
        return dataclasses.replace(paired, is_paired=True)
    ours = np.array(list(values.values()))
    theirs = np.array(list(baseline.values()))
    if not len(ours) or not len(theirs):
        return Estimate(math.nan, math.nan, math.nan, 0)
    gap = float(ours.mean() - theirs.mean())
    count = min(len(ours), len(theirs))
    if count < FEWEST:
        return Estimate(gap, math.nan, math.nan, count)
    # Two streams: the same one would pair values that have nothing to do with each other.
    resampled = _resampled(ours, 0) - _resampled(theirs, 1)
    return _estimate(resampled, gap, count)


def ratio(values: Mapping[str, float], baseline: Mapping[str, float]) -> Estimate:
    """Return the mean of `values` over that of `baseline`, on shared seeds, which are resampled as
    pairs.

    NaN where either mean is not positive: a ratio would mean nothing; no interval for fewer than
    five seeds.
    """
    shared = [seed for seed in values if seed in baseline]
    ours = np.asarray([values[seed] for seed in shared])
    theirs = np.asarray([baseline[seed] for seed in shared])
    if not shared or min(ours.mean(), theirs.mean()) <= 0:
        return Estimate(math.nan, math.nan, math.nan, len(shared))
    centre = float(ours.mean() / theirs.mean())
    if len(shared) < FEWEST:
        return Estimate(centre, math.nan, math.nan, len(shared), is_paired=True)
    baselines = _resampled(theirs, 0)
    # A resampled baseline near 0 gives ratios without bound, whose quantiles say nothing.
    if baselines.min() <= 0:
        return Estimate(centre, math.nan, math.nan, len(shared), is_paired=True)
    # One stream for both, so that a resample takes the same seeds of each: they are pairs.
    estimate = _estimate(_resampled(ours, 0) / baselines, centre, len(shared))
    return dataclasses.replace(estimate, is_paired=True)


def _resampled(totals: np.ndarray, stream: int, sizes: np.ndarray | None = None) -> np.ndarray:
    """Draw resamples and return their means: of sums over clusters of `sizes` values, without them
    of single values.
    """
    rng = np.random.default_rng(stream)
    shape = (BLOCK, len(totals))
    means = []
    for _ in range(RESAMPLES // BLOCK):
        rows = rng.integers(len(totals), size=shape)
        num_values = len(totals) if sizes is None else sizes[rows].sum(1)
        means.append(totals[rows].sum(1) / num_values)
    return np.concatenate(means)


def _student(count: int) -> float:
    """Return Student's quantile for the mean of `count` values."""
    return float(stdtrit(count - 1, (1 + LEVEL) / 2))


def _estimate(means: np.ndarray, centre: float, count: int) -> Estimate:
    """Return the interval between the expanded percentiles of resampled means."""
    # Hesterberg's tail: wider than (1 - LEVEL) / 2 by Student's quantile and by n / (n - 1).
    tail = ndtr(-math.sqrt(count / (count - 1)) * _student(count))
    low, high = np.quantile(means, (tail, 1 - tail))
    return Estimate(centre, float(low), float(high), count)


def by_prompt(
    values: Float[np.ndarray, "B"], prompts: Int[np.ndarray, "B"]
) -> Float[np.ndarray, "P"]:
    """Return the mean of each prompt's finite values, NaN where it has none; `prompts` counts from
    0.
    """
    num_prompts = int(prompts.max()) + 1 if len(prompts) else 0
    usable = np.isfinite(values)
    total = np.bincount(prompts[usable], values[usable], num_prompts)
    count = np.bincount(prompts[usable], minlength=num_prompts)
    return np.divide(total, count, out=np.full(num_prompts, math.nan), where=count > 0)


def fallen(
    before: Mapping[str, Float[np.ndarray, "B"]],
    now: Mapping[str, Float[np.ndarray, "B"]],
    prompts: Int[np.ndarray, "B"],
    texts: Int[np.ndarray, "P"],
) -> list[str]:
    """Name the metrics that fell while the first one rose, both beyond what their prompts' spread
    explains.

    `before` and `now` hold the same metrics of the same prompts and noise, the training reward
    first; prompts of one number in `texts` are the same one. Gold metrics that fall while the
    reward rises are the mark of a reward that is being cheated.
    """
    changes = {}
    for name, values in before.items():
        # Prompt by prompt, since the prompts and their noise are the same in both.
        change = by_prompt(now[name], prompts) - by_prompt(values, prompts)
        changes[name] = mean(change, texts)
    proxy, *gold = changes
    if not changes[proxy].low > 0:
        return []
    return [name for name in gold if changes[name].high < 0]
