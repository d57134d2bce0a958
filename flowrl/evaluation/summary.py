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

    Distances are measured from `reference`, the name of a folder and its pictures' features, or
    else from the images of the first policy; only on sets with two images or more.
    """
    base = next(iter(assessments.values()))
    results: dict[str, dict[str, Numbers]] = {}
    for name in base.evaluator.sets:
        results[name] = {}
        for label, assessment in assessments.items():
            against = None if assessment is base else base
            results[name][label] = numbers(assessment, name, against)
        if len(base.rows(name)) > 1:
            for label, values in distances(assessments, name, network, reference).items():
                results[name][label]["distances"] = values
    return results


def distances(
    assessments: Mapping[str, Assessment],
    name: str,
    network: RandomConv | Inception,
    reference: tuple[str, Tensor] | None,
) -> dict[str, Numbers]:
    """Measure how far each policy's images of a set are from the reference's, or else how far those
    of all others are from the first policy's.
    """
    features_of = {
        label: all_features(network, read_images(assessment.files(name)))
        for label, assessment in assessments.items()
    }
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
            "kernel": kernel(features, target, is_paired=reference is None),
            "features": network.name,
            "is_published": isinstance(network, Inception),
            "against": against,
        }
    return results


def numbers(assessment: Assessment, name: str, base: Assessment | None) -> Numbers:
    """Estimate all metrics of a set, and their differences from the base model's, prompt by prompt.

    The metric that the evaluation's headline names, else the reward, is broken down by the prompts'
    task families.
    """
    evaluator = assessment.evaluator
    means = assessment.prompt_means(name)
    samples = assessment.samples(name)
    texts = assessment.texts(name)
    base_means = base.prompt_means(name) if base else {}
    spread = means.pop("spread")
    changes = {key: values - base_means[key] for key, values in means.items() if key in base_means}
    headline = evaluator.headline if evaluator.headline in means else "reward"
    families = _families([prompt.family for prompt in evaluator.sets[name]])
    return {
        "prompts": evaluator.told(name),
        "num_images": len(samples),
        "missing": sum(not sample["is_valid"] for sample in samples) / max(len(samples), 1),
        "kl_ref": assessment.drift(name).get("kl_ref"),
        "diversity": _root(plain(mean(spread, texts))),
        "metrics": {key: plain(mean(values, texts)) for key, values in means.items()},
        "changes": {key: plain(mean(values, texts)) for key, values in changes.items()},
        "headline": headline,
        "families": _by_family(means.get(headline), texts, families),
        "family_changes": _by_family(changes.get(headline), texts, families),
    }


def _by_family(
    values: Float[np.ndarray, "P"] | None,
    texts: Int[np.ndarray, "P"],
    families: Mapping[str, np.ndarray],
) -> dict[str, Numbers | None]:
    """Estimate the mean of each family's prompts; nothing without values."""
    if values is None:
        return {}
    return {family: plain(mean(values[rows], texts[rows])) for family, rows in families.items()}


def _families(names: list[str]) -> dict[str, np.ndarray]:
    """Return the numbers of each task family's prompts; families in the set's order, or by the
    numbers in their names.
    """
    families = sorted(filter(None, dict.fromkeys(names)), key=_digits)
    return {family: np.flatnonzero(np.array(names) == family) for family in families}


def _digits(name: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", name)]


def plain(estimate: Estimate) -> Numbers | None:
    """Return an estimate for JSON, which has no NaN: None where there is no mean, or no bound."""
    if math.isnan(estimate.mean):
        return None
    bounds = {"low": estimate.low, "high": estimate.high}
    known = {key: None if math.isnan(value) else value for key, value in bounds.items()}
    return {"mean": estimate.mean, **known, "num_prompts": estimate.count}


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
    """
    base = next(iter(assessments.values())).evaluator
    prompts = base.sets[name]
    samples_of = {
        label: assessment.samples(name)[:: base.images_per_prompt]
        for label, assessment in assessments.items()
    }
    rows = []
    for i in sorted(random.Random(0).sample(range(len(prompts)), min(count, len(prompts)))):
        images: list[tuple[str, Path, float | None]] = []
        for label, samples in samples_of.items():
            score = samples[i]["parts"].get(base.headline, samples[i]["reward"])
            images.append((label, assessments[label].folder / name / samples[i]["file"], score))
        rows.append((prompts[i].text, prompts[i].family, images))
    return rows
