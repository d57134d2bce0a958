"""The comparison of runs: conditions, which are runs alike but for their seed, and the
configuration keys that make them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flowrl.report.runs import Run

ABSENT = "-"
LABELS = ("run_dir", "name", "tags", "condition", "sweep", "choices.", "logger.wandb.")
IMMATERIAL = (
    "resume",
    "num_threads",
    "logger.",
    "callbacks.",
    "checkpoint.",
    "viewing.",
    "trainer.",
    "batch.num_processes",
    "batch.max_micro_batch",
)
"""These say where, how fast and with what record a run went, and are no part of its condition.
Labels are no difference at all.
"""


@dataclass(frozen=True)
class Condition:
    """Runs with the same configuration but for their seed; `values` are of the keys that tell
    conditions apart.

    `values` are the texts of a configuration, a `_target_` shortened as `short` does it, and
    `label` says them in one line.
    """

    label: str
    values: Mapping[str, str]
    runs: Sequence[Run]

    def by_seed(self, metric: str) -> dict[str, float]:
        """Return the final value of each finished run, NaN left out; the last run of a seed
        counts.
        """
        finals = {run.seed: run.final(metric) for run in self.runs if run.status == "finished"}
        return {seed: value for seed, value in finals.items() if not math.isnan(value)}


def differences(runs: Sequence[Run]) -> dict[tuple[str, ...], list[str]]:
    """Return the values, run by run, of each key that differs; keys that differ alike, such as
    copies, share an entry.
    """
    keys = dict.fromkeys(key for run in runs for key in run.config)
    alike: dict[tuple[str, ...], list[str]] = {}
    for key in sorted(keys, key=_order):
        if _is_label(key) or _names_folder(key, runs):
            continue
        values = tuple(run.config.get(key, ABSENT) for run in runs)
        if len(set(values)) > 1:
            alike.setdefault(values, []).append(key)
    # Turned around, so that an entry is known by its keys.
    return {tuple(names): list(values) for values, names in alike.items()}


def _is_label(key: str) -> bool:
    """Tell whether a key is one of the labels, or stands below one."""
    return key in LABELS or key.startswith(tuple(name for name in LABELS if name.endswith(".")))


def _names_folder(key: str, runs: Sequence[Run]) -> bool:
    """Tell whether a key holds each run's folder, which differs between any two runs."""
    for run in runs:
        folder = run.config.get("run_dir")
        if folder is None or run.config.get(key) != folder:
            return False
    return True


def conditions(runs: Sequence[Run]) -> list[Condition]:
    """Group the runs; keys that follow from others (a loss brings its own options) are not
    named.

    Conditions come in the order of their values, numbers by size.
    """
    values_of = _distinguishing(runs)
    grouped: dict[tuple[str, ...], list[Run]] = {}
    for i, run in enumerate(runs):
        cell = tuple(values[i] for values in values_of.values())
        grouped.setdefault(cell, []).append(run)
    order = sorted(grouped, key=lambda cell: [_sortable(text) for text in cell])
    ordered = []
    for cell in order:
        values = dict(zip(values_of, cell, strict=True))
        ordered.append(_condition(values, grouped[cell]))
    return ordered


def _distinguishing(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return the keys that tell conditions apart, each with its values run by run.

    A key counts where it splits a group of runs that the keys before it leave whole.
    """
    values_of: dict[str, list[str]] = {}
    # A run's values of the keys that count so far; runs of one group have equal cells.
    cells: list[tuple[str, ...]] = [() for _ in runs]
    for key, values in _material_differences(runs).items():
        # The groups as they would be with this key.
        finer = [(*cell, value) for cell, value in zip(cells, values, strict=True)]
        if len(set(finer)) > len(set(cells)):
            values_of[key] = values
            cells = finer
    return values_of


def _material_differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return the differences that neither the seeds explain nor where and how a run went."""
    values_of = {}
    seeds = [run.seed for run in runs]
    for names, values in differences(runs).items():
        material = [name for name in names if name != "seed" and not name.startswith(IMMATERIAL)]
        # A seed below another node, or a value that is the seed run by run, follows the seed.
        has_seed = any(name.endswith(".seed") for name in material)
        if material and values != seeds and not has_seed:
            values_of[material[0]] = values
    return values_of


def _condition(values: Mapping[str, str], runs: Sequence[Run]) -> Condition:
    """Make a condition of runs with these values, and name it by them."""
    plain = {key.removesuffix("._target_"): short(value) for key, value in values.items()}
    words = [f"{key}={value}" for key, value in plain.items() if value != ABSENT]
    # Without any difference the runs are all of one condition.
    label = ", ".join(words) or runs[0].config.get("name", "all runs")
    return Condition(label, plain, runs)


def short(value: str) -> str:
    """Return a `_target_` by the name of its option: flowrl.samplers.sde.FlowSDE is flow_sde. Other
    values stay.
    """
    if not re.fullmatch(r"[a-z_]\w*(\.\w+)+", value):
        return value
    _, name = value.rsplit(".", 1)
    # An underscore before every capital that follows a small letter.
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def _order(key: str) -> tuple[bool, int, str]:
    """Sort options before their values, short keys before the copies that interpolations make of
    them.
    """
    return not key.endswith("_target_"), key.count("."), key


def _sortable(text: str) -> tuple[float, str]:
    """Return what sorts numbers by size and words by the alphabet."""
    try:
        return float(text), ""
    except ValueError:
        return 0.0, text
