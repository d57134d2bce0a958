"""The metrics of a prompt set: means over its images that are numbers, by the glossary's names."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flowrl.evaluation.shares import Share
from flowrl.statistics import average
from flowrl.types import Prompt, RewardOutput

log = logging.getLogger(__name__)


def set_metrics(
    name: str, prompts: Sequence[Prompt], share: Share, headline: str, images_per_prompt: int
) -> dict[str, float]:
    """Return the metrics of the set `name`, whose rows have these prompts; one that no image has a
    value for is left out.

    `headline` is the reward part that is averaged by task family, too.
    """
    # Any statistic would do: all of them are NaN where a pixel is.
    is_broken = ~share.looks["brightness"].isfinite()
    if num_broken := int(is_broken.sum()):
        log.warning(
            "%s: %d of %d images have pixels that are no numbers", name, num_broken, len(prompts)
        )
    output = share.scores
    metrics = {"missing": float(1 - output.is_valid.float().mean())}
    if images_per_prompt > 1:  # a 0 would read as collapse
        # The root of the mean, not the mean of roots, as the spread is a mean square.
        metrics |= _finite_mean("diversity", share.spread, torch.sqrt)
    for stat, values in share.looks.items():
        metrics |= _finite_mean(f"panel/{stat}", values)
    if output.has_value.any():
        metrics["reward"] = float(output.values[output.has_value].mean())
    for part, values in output.parts.items():
        metrics |= _finite_mean(f"part/{part}", values[output.is_valid])
    return metrics | _family_means(prompts, output, headline)


def _family_means(
    prompts: Sequence[Prompt], output: RewardOutput, headline: str
) -> dict[str, float]:
    """Return the means of the headline by task family, over the samples that have a value."""
    scores = output.parts.get(headline, output.values)
    is_usable = output.is_valid & scores.isfinite()
    values_of: dict[str, list[float]] = {}
    for row in is_usable.nonzero().flatten().tolist():
        family = prompts[row].family
        if family:
            values = values_of.setdefault(family, [])
            values.append(float(scores[row]))
    return {f"family/{family}": average(values) for family, values in values_of.items()}


def _finite_mean(
    name: str, values: Tensor, then: Callable[[Tensor], Tensor] = torch.clone
) -> dict[str, float]:
    """Return the mean of a statistic of images over the images whose pixels are numbers; no metric
    where there is none.
    """
    usable = values[values.isfinite()]
    if not len(usable):
        return {}
    mean = usable.mean()
    return {name: float(then(mean))}
