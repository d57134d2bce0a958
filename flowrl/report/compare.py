"""Which runs differ in what: conditions (runs alike but for their seed) and the configuration keys
that make them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flowrl.report.runs import Run

ABSENT = "-"
LABELS = ("run_dir", "name", "tags", "logger.wandb.name", "logger.wandb.tags")
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
"""Where, how fast and with what record a run went: no part of its condition. Labels are no
difference at all.
"""


@dataclass(frozen=True)
class Condition:
    """Runs with the same configuration but for their seed; `values` are of the keys that tell
    conditions apart.
    """

    label: str
    values: Mapping[str, str]
    runs: Sequence[Run]

    def by_seed(self, metric: str) -> dict[str, float]:
        """The final value of each finished run, NaN left out; the last run of a seed counts."""
        finals = {run.seed: run.final(metric) for run in self.runs if run.status == "finished"}
        return {seed: value for seed, value in finals.items() if value == value}


def differences(runs: Sequence[Run]) -> dict[tuple[str, ...], list[str]]:
    """Values, run by run, of each key that differs; keys that differ alike, such as copies, share
    an entry.
    """
    keys = dict.fromkeys(key for run in runs for key in run.config)
    alike: dict[tuple[str, ...], list[str]] = {}
    for key in sorted(keys, key=_order):
        values = tuple(run.config.get(key, ABSENT) for run in runs)
        if len(set(values)) > 1 and not (key in LABELS or _names_folder(key, runs)):
            alike.setdefault(values, []).append(key)
    return {tuple(names): list(values) for values, names in alike.items()}


def _names_folder(key: str, runs: Sequence[Run]) -> bool:
    return all(
        run.config.get("run_dir") is not None and run.config.get(key) == run.config["run_dir"]
        for run in runs
    )


def conditions(runs: Sequence[Run]) -> list[Condition]:
    """The runs, grouped; keys that follow from others (a loss brings its own options) are not
    named.
    """
    keys: list[str] = []
    cells: list[tuple[str, ...]] = [() for _ in runs]
    seeds = [run.seed for run in runs]
    for names, values in differences(runs).items():
        named = [name for name in names if name != "seed" and not name.startswith(IMMATERIAL)]
        if not named or values == seeds or any(name.endswith(".seed") for name in named):
            continue
        finer = [(*cell, value) for cell, value in zip(cells, values, strict=True)]
        if len(set(finer)) > len(set(cells)):
            keys.append(named[0])
            cells = finer
    grouped: dict[tuple[str, ...], list[Run]] = {}
    for cell, run in zip(cells, runs, strict=True):
        grouped.setdefault(cell, []).append(run)
    order = sorted(grouped, key=lambda cell: [_sortable(text) for text in cell])
    return [_condition(dict(zip(keys, cell, strict=True)), grouped[cell]) for cell in order]


def _condition(values: Mapping[str, str], runs: Sequence[Run]) -> Condition:
    plain = {key.removesuffix("._target_"): short(value) for key, value in values.items()}
    label = ", ".join(f"{key}={value}" for key, value in plain.items() if value != ABSENT)
    return Condition(label or runs[0].config.get("name", "all runs"), plain, runs)


def short(value: str) -> str:
    """A `_target_` by the name of its option: flowrl.samplers.sde.FlowSDE is flow_sde. Other values
    stay.
    """
    if not re.fullmatch(r"[a-z_]\w*(\.\w+)+", value):
        return value
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", value.rsplit(".", 1)[1]).lower()


def _order(key: str) -> tuple[bool, int, str]:
    """Options before their values, short keys before the copies that interpolations make of
    them.
    """
    return not key.endswith("_target_"), key.count("."), key


def _sortable(text: str) -> tuple[float, str]:
    try:
        return float(text), ""
    except ValueError:
        return 0.0, text
