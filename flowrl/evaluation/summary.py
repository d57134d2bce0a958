"""The numbers of several evaluated policies, each with its interval, and their differences from the
first one's.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from flowrl.evaluation.distances import Inception, RandomConv, all_features, frechet, kernel
from flowrl.evaluation.page import SOURCE
from flowrl.evaluation.pictures import read_images
from flowrl.evaluation.samples import Assessment
from flowrl.statistics import Estimate, mean

Numbers = dict[str, Any]


def summarise(
    assessments: Mapping[str, Assessment],
    network: RandomConv | Inception,
    reference: tuple[str, Tensor] | None,
) -> dict[str, dict[str, Numbers]]:
    """Return, set by set, the numbers of each policy by its label.

    `assessments` holds each policy's samples by its label, the base model's first: the others'
    differences are taken from it. Distances are measured from `reference`, the name of a folder and
    its pictures' features, or else from the images of the first policy; only on sets with two
    images or more. They stand under `distances`; for all else see `numbers`.
    """
    base = next(iter(assessments.values()))
    results: dict[str, dict[str, Numbers]] = {}
    for name in base.evaluator.sets:
        numbers_of: dict[str, Numbers] = {}
        for label, assessment in assessments.items():
            against = None if assessment is base else base
            numbers_of[label] = numbers(assessment, name, against)
        # The covariance of one image's features is not defined.
        if len(base.rows(name)) > 1:
            measured = distances(assessments, name, network, reference)
            for label, values in measured.items():
                numbers_of[label]["distances"] = values
        results[name] = numbers_of
    return results


def distances(
    assessments: Mapping[str, Assessment],
    name: str,
    network: RandomConv | Inception,
    reference: tuple[str, Tensor] | None,
) -> dict[str, Numbers]:
    """Measure how far each policy's images of a set are from the reference's, or else how far those
    of all others are from the first policy's.

    A policy's numbers are the Fréchet and the kernel distance, as `frechet` and `kernel`, with the
    network's name, whether published scores are taken with it, and from what they are measured.
    """
    features_of = {}
    for label, assessment in assessments.items():
        images = read_images(assessment.files(name))
        features_of[label] = all_features(network, images)
    # The images of two policies share their prompts and their noise; those of a folder do not.
    is_paired = reference is None
    if reference is None:
        first = next(iter(assessments))
        against = f"the images of {first}"
        target = features_of.pop(first)
    else:
        against, target = reference
    results = {}
    for label, features in features_of.items():
        results[label] = {
            "frechet": frechet(features, target),
            "kernel": kernel(features, target, is_paired=is_paired),
            "features": network.name,
            "is_published": isinstance(network, Inception),
            "against": against,
        }
    return results


def numbers(assessment: Assessment, name: str, base: Assessment | None) -> Numbers:
    """Estimate all metrics of a set, and their differences from the base model's, prompt by prompt.

    The metric that the evaluation's headline names, else the reward, is broken down by the prompts'
    task families. Every estimate is as `plain` gives it; without a `base` there are no changes.
    """
    evaluator = assessment.evaluator
    samples = assessment.samples(name)
    num_missing = sum(not sample["is_valid"] for sample in samples)
    # One mean a prompt, and a number for its text: equal texts count once in an interval.
    means = assessment.prompt_means(name)
    texts = assessment.texts(name)
    # The spread is squared, so its mean is; only the root of that is worth reading.
    spread = means.pop("spread")
    diversity = plain(mean(spread, texts))
    # Prompt by prompt, from the same noise: a difference so paired has the narrower interval.
    changes = {}
    if base is not None:
        base_means = base.prompt_means(name)
        shared = [key for key in means if key in base_means]
        changes = {key: means[key] - base_means[key] for key in shared}
    headline = evaluator.headline if evaluator.headline in means else "reward"
    families = _families([prompt.family for prompt in evaluator.sets[name]])
    return {
        "prompts": evaluator.describe(name),
        "num_images": len(samples),
        "missing": num_missing / max(len(samples), 1),
        "kl_ref": assessment.drift(name).get("kl_ref"),
        "diversity": _root(diversity),
        "metrics": _estimates(means, texts),
        "changes": _estimates(changes, texts),
        "headline": headline,
        "families": _by_family(means.get(headline), texts, families),
        "family_changes": _by_family(changes.get(headline), texts, families),
    }


def _estimates(
    columns: Mapping[str, Float[np.ndarray, "P"]], texts: Int[np.ndarray, "P"]
) -> dict[str, Numbers | None]:
    """Estimate the mean of each metric over the prompts."""
    return {key: plain(mean(values, texts)) for key, values in columns.items()}


def _by_family(
    values: Float[np.ndarray, "P"] | None,
    texts: Int[np.ndarray, "P"],
    families: Mapping[str, np.ndarray],
) -> dict[str, Numbers | None]:
    """Estimate the mean of each family's prompts; nothing without values."""
    if values is None:
        return {}
    estimates = {}
    for family, rows in families.items():
        estimates[family] = plain(mean(values[rows], texts[rows]))
    return estimates


def _families(names: list[str]) -> dict[str, np.ndarray]:
    """Return the numbers of each task family's prompts; families in the set's order, or by the
    numbers in their names.
    """
    array = np.array(names)
    distinct = filter(None, dict.fromkeys(names))  # a prompt may have no family
    families = sorted(distinct, key=_digits)
    return {family: np.flatnonzero(array == family) for family in families}


def _digits(name: str) -> list[int]:
    """Return the numbers in a name; names without any keep their order, as sorting is stable."""
    return [int(digits) for digits in re.findall(r"\d+", name)]


def plain(estimate: Estimate) -> Numbers | None:
    """Return an estimate for JSON, which has no NaN: None where there is no mean, or no bound.

    Its keys are `mean`, `low`, `high` and `num_prompts`.
    """
    if math.isnan(estimate.mean):
        return None
    return {
        "mean": estimate.mean,
        "low": None if math.isnan(estimate.low) else estimate.low,
        "high": None if math.isnan(estimate.high) else estimate.high,
        "num_prompts": estimate.count,
    }


def _root(square: Numbers | None) -> Numbers | None:
    """Return the root of a mean square, and of its interval.

    Student's interval of a few prompts may reach below 0, where no mean square is: it ends there.
    """
    if square is None:
        return None
    roots = dict(square)
    for key in ("mean", "low", "high"):
        value = square[key]
        roots[key] = None if value is None else math.sqrt(max(value, 0.0))
    return roots


def gallery(
    assessments: Mapping[str, Assessment], name: str, count: int
) -> list[tuple[str, str, list[Any]]]:
    """Return the first image of some prompts of a set, drawn by lot: (prompt, family, [(label,
    file, score or None), ...]).

    Up to `count` prompts are drawn, the same ones for every policy and in every call, and stand in
    the set's order. The score is the headline's part of the reward, else the reward. The picture
    that a prompt edits stands first, under the label `SOURCE`.
    """
    base = next(iter(assessments.values())).evaluator
    prompts = base.sets[name]
    # The first record of each prompt, by label.
    samples_of = {}
    for label, assessment in assessments.items():
        samples_of[label] = assessment.samples(name)[:: base.images_per_prompt]
    lot = random.Random(0).sample(range(len(prompts)), min(count, len(prompts)))
    rows = []
    for i in sorted(lot):
        images: list[tuple[str, Path, float | None]] = []
        source = prompts[i].image
        if source is not None:
            images.append((SOURCE, Path(source.path), None))
        for label, samples in samples_of.items():
            sample = samples[i]
            score = sample["parts"].get(base.headline, sample["reward"])
            file = assessments[label].folder / name / sample["file"]
            images.append((label, file, score))
        rows.append((prompts[i].text, prompts[i].family, images))
    return rows
