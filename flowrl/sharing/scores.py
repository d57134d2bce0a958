"""The scores of a model card: from an evaluation with intervals, or from the run's own summary,
which has means alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowrl.errors import UserError
from flowrl.runs.command_line import tool_command
from flowrl.runs.files import file_digest, read_object

RESULTS = "results.json"
SETTINGS = "settings.json"

DRIFT = {
    "diversity": "diversity",
    "kl_ref": "KL from the reference",
    "missing": "rewards missing",
}
"""Numbers beside the scores, and their names on the card."""


@dataclass(frozen=True, slots=True)
class Score:
    """A row of the card's table: a metric before and after training and its change, as texts; the
    headline is the one that the run was judged by.
    """

    metric: str
    before: str
    after: str
    change: str = ""
    is_headline: bool = False


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores on one set of prompts, which `about` describes; `has_fallen` says that the
    headline is lower than before, and `has_intervals` whether chance is told apart.
    """

    name: str
    about: str
    rows: Sequence[Score]
    has_fallen: bool
    has_intervals: bool


def from_summary(summary: Mapping[str, Any], config: Mapping[str, Any]) -> list[Scores]:
    """Return the scores of a run's evaluations before and after training; none where it was not
    evaluated at both times.
    """
    evaluations = summary.get("eval") or {}
    before, after = evaluations.get("before"), evaluations.get("after")
    if not before or not after:
        return []
    evaluation = config.get("evaluation") or {}
    headline = str(evaluation.get("headline", "reward"))
    about = _size(evaluation)
    # The first set's numbers stand at the top, those of the others under their names.
    first, *others = evaluation.get("sets") or {"evaluation": None}
    scores = [_by_means(first, about, before, after, headline)]
    for name in others:
        if name in before and name in after:
            scores.append(_by_means(name, about, before[name], after[name], headline))
    return scores


def _size(evaluation: Mapping[str, Any]) -> str:
    """Describe how much was drawn for the means of a run's own evaluation."""
    most = evaluation.get("max_prompts")
    prompts = "all prompts" if most is None else f"at most {most} prompts"
    return f"{prompts} of the set, {evaluation.get('images_per_prompt')} images each; means"


def _by_means(
    name: str, about: str, before: Mapping[str, Any], after: Mapping[str, Any], headline: str
) -> Scores:
    """Compare the means of a set."""
    shared = _shared_numbers(before, after)
    metrics = [key for key in shared if key not in DRIFT]
    headline = headline if headline in metrics else "reward"
    drift = [key for key in DRIFT if key in shared]
    rows = []
    for key in (*_ordered(metrics, headline), *drift):
        old, new = _short(before[key]), _short(after[key])
        rows.append(Score(DRIFT.get(key, key), old, new, is_headline=key == headline))
    has_fallen = headline in metrics and after[headline] < before[headline]
    return Scores(name, about, rows, has_fallen, has_intervals=False)


def from_evaluation(folder: Path, weights: Sequence[Path], run: Path) -> list[Scores]:
    """Return the scores of an evaluation of `flowrl evaluate`, of the base model and of exactly the
    run's weights, which are known by their digests.

    Raises UserError where the folder is no evaluation, or has none of these weights or no base.
    """
    remedy = f"run {tool_command('evaluate', 'evaluate.py', 'base', str(run), '--out', 'FOLDER')}"
    if not (folder / RESULTS).is_file():
        raise UserError(f"--evaluation {folder}: no {RESULTS} there; {remedy}")
    results = read_object(folder / RESULTS, remedy)
    wanted = " ".join(file_digest(path) for path in weights)
    labels = {}
    for path in sorted(folder.glob(f"*/{SETTINGS}")):
        labels[read_object(path, remedy).get("weights")] = path.parent.name
    if wanted not in labels or None not in labels:
        missing = "the base model" if wanted in labels else "this run's weights"
        raise UserError(f"--evaluation {folder}: {missing} were not evaluated there; {remedy}")
    base, own = labels[None], labels[wanted]
    scores = []
    for name, subjects in results.items():
        if base in subjects and own in subjects:
            scores.append(_by_estimates(name, subjects[base], subjects[own]))
    return scores


def _by_estimates(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Scores:
    """Compare the estimates of a set; the change is of the same prompts from the same noise."""
    headline = str(after["headline"])
    old, new = before["metrics"], after["metrics"]
    changes = after.get("changes") or {}
    metrics = [key for key in new if key in old and not key.startswith("panel/")]
    rows = []
    for key in _ordered(metrics, headline):
        rows.append(
            Score(
                key,
                _estimate(old[key]),
                _estimate(new[key]),
                _estimate(changes.get(key), has_sign=True),
                is_headline=key == headline,
            )
        )
    for key, label in DRIFT.items():
        rows.append(Score(label, _estimate(before.get(key)), _estimate(after.get(key))))
    change = changes.get(headline) or {}
    about = (
        f"{after['prompts']}; {after['num_images']} images of either model; 95 % intervals over "
        "prompts"
    )
    has_fallen = (change.get("mean") or 0.0) < 0
    return Scores(name, about, rows, has_fallen, has_intervals=True)


def _shared_numbers(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """List the metrics that both evaluations have a number of."""
    return [key for key in before if _is_number(before[key]) and _is_number(after.get(key))]


def _ordered(metrics: Sequence[str], headline: str) -> list[str]:
    """Put the headline first, then the reward."""
    return sorted(metrics, key=lambda key: (key != headline, key != "reward"))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: float) -> str:
    return f"{value:.3g}"


def _signed(value: float) -> str:
    return f"{value:+.3g}"


def _estimate(value: Any, *, has_sign: bool = False) -> str:
    """Return a number, or an estimate with its interval, as text; empty for neither."""
    write = _signed if has_sign else _short
    if _is_number(value):
        return write(value)
    if not isinstance(value, Mapping):
        return ""
    if value.get("low") is None:
        return write(value["mean"])
    return f"{write(value['mean'])} [{write(value['low'])}, {write(value['high'])}]"
