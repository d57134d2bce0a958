"""Means over prompts with bootstrap intervals.

The images of one prompt are not independent, so prompts are resampled, not images: an image more for the same prompts
must not shrink an interval as a prompt more does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

RESAMPLES = 2000
LEVEL = 0.95
"""Share of resamples that an interval holds."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over prompts of means over their images, its 95 % bootstrap interval, and the number of prompts."""

    mean: float
    low: float
    high: float
    num_prompts: int


def by_prompt(values: Float[Tensor, "B"], prompts: Int[Tensor, "B"]) -> Float[Tensor, "P"]:
    """The mean of each prompt's finite values, NaN where it has none; `prompts` counts from 0."""
    num_prompts = int(prompts.max()) + 1 if len(prompts) else 0
    usable = values.isfinite()
    none = torch.zeros(num_prompts, dtype=torch.float64)
    total = none.index_add(0, prompts[usable], values[usable].double())
    return total / none.index_add(0, prompts[usable], usable[usable].double())


def estimate(means: Float[Tensor, "P"]) -> Estimate | None:
    """The mean of prompts' means and its percentile interval; None where no prompt has a value.

    Resampling is seeded, so equal values give equal intervals.
    """
    usable = means[means.isfinite()].double()
    if not len(usable):
        return None
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(usable), (RESAMPLES, len(usable)), generator=generator)
    resampled = usable[picks].mean(1)
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = torch.quantile(resampled, ends).tolist()
    return Estimate(float(usable.mean()), low, high, len(usable))


def difference(means: Float[Tensor, "P"], other: Float[Tensor, "P"]) -> Estimate | None:
    """Of two evaluations of the same prompts: the mean of `means - other`, prompt by prompt."""
    return estimate(means - other)


def fallen(
    before: Mapping[str, Float[Tensor, "B"]], now: Mapping[str, Float[Tensor, "B"]], prompts: Int[Tensor, "B"]
) -> list[str]:
    """Metrics that fell while the first one rose, both beyond what their prompts' spread explains.

    `before` and `now` hold the same metrics of the same prompts and noise, the training reward first. Gold metrics that
    fall while it rises are the mark of a reward that is being cheated.
    """
    changes = {
        name: difference(by_prompt(now[name], prompts), by_prompt(values, prompts)) for name, values in before.items()
    }
    proxy, *gold = changes
    rise = changes[proxy]
    if rise is None or rise.low <= 0:
        return []
    return [name for name in gold if (change := changes[name]) is not None and change.high < 0]
