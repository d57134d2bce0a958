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
    """Set by set, the numbers of each policy by its label.

    Distances are measured from `reference`, the name of a folder and its pictures' features, or
    else from the images of the first policy; only on sets with two images or more.
    """
    (first, base), *_ = assessments.items()
    results: dict[str, dict[str, Numbers]] = {}
    for name in base.evaluator.sets:
        results[name] = {
            label: numbers(each, name, None if each is base else base)
            for label, each in assessments.items()
        }
        if len(base.rows(name)) < 2:
            continue
        ours = {
            label: all_features(network, read_images(each.files(name)))
            for label, each in assessments.items()
        }
        against, theirs = reference or (f"the images of {first}", ours[first])
        if reference is None:
            del ours[first]
        for label, features in ours.items():
            results[name][label]["distances"] = {
                "frechet": frechet(features, theirs),
                "kernel": kernel(features, theirs, is_paired=reference is None),
                "features": network.name,
                "is_published": isinstance(network, Inception),
                "against": against,
            }
    return results


def numbers(own: Assessment, name: str, base: Assessment | None) -> Numbers:
    """Estimates of all metrics of a set, and of their differences from the base model's, prompt by
    prompt.

    The metric that the evaluation's headline names, else the reward, is broken down by the prompts'
    task families.
    """
    means = own.prompt_means(name)
    samples = own.samples(name)
    texts = own.texts(name)
    others = base.prompt_means(name) if base else {}
    spread = means.pop("spread")
    changes = {key: values - others[key] for key, values in means.items() if key in others}
    headline = own.evaluator.headline if own.evaluator.headline in means else "reward"
    families = _families([prompt.family for prompt in own.evaluator.sets[name]])
    return {
        "prompts": own.evaluator.told(name),
        "num_images": len(samples),
        "missing": sum(not sample["is_valid"] for sample in samples) / max(len(samples), 1),
        "kl_ref": own.drift(name).get("kl_ref"),
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
    """The estimate of each family's prompts; nothing without values."""
    if values is None:
        return {}
    return {family: plain(mean(values[rows], texts[rows])) for family, rows in families.items()}


def _families(names: list[str]) -> dict[str, np.ndarray]:
    """The numbers of each task family's prompts; families in the set's order, or by the numbers in
    their names.
    """
    found = sorted(
        dict.fromkeys(names), key=lambda name: [int(digits) for digits in re.findall(r"\d+", name)]
    )
    return {family: np.flatnonzero(np.array(names) == family) for family in found if family}


def plain(found: Estimate) -> Numbers | None:
    """An estimate for JSON, which has no NaN: None where there is no mean, or no bound."""
    if math.isnan(found.mean):
        return None
    bounds = {"low": found.low, "high": found.high}
    known = {key: None if math.isnan(value) else value for key, value in bounds.items()}
    return {"mean": found.mean, **known, "num_prompts": found.count}


def _root(found: Numbers | None) -> Numbers | None:
    """The root of a mean square, and of its interval."""
    return found and found | {
        key: found[key] and found[key] ** 0.5 for key in ("mean", "low", "high")
    }


def gallery(
    assessments: Mapping[str, Assessment], name: str, count: int
) -> list[tuple[str, str, list[Any]]]:
    """The first image of some prompts of a set, drawn by lot: (prompt, family, [(label, file, score
    or None), ...]).
    """
    base = next(iter(assessments.values())).evaluator
    stride = base.images_per_prompt
    total = len(base.sets[name])
    records = {label: each.samples(name)[::stride] for label, each in assessments.items()}
    rows = []
    for i in sorted(random.Random(0).sample(range(total), min(count, total))):
        images: list[tuple[str, Path, float | None]] = []
        for label, own in records.items():
            score = own[i]["parts"].get(base.headline, own[i]["reward"])
            images.append((label, assessments[label].folder / name / own[i]["file"], score))
        prompt = base.sets[name][i]
        rows.append((prompt.text, prompt.family, images))
    return rows
