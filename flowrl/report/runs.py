"""A reader of run folders, which sees config.yaml, metrics.csv, summary.json, the changes in
provenance.json and images/, and nothing else.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from flowrl.errors import UserError
from flowrl.runs.changes import Change, read_changes
from flowrl.runs.files import CONFIG, METRICS, PROVENANCE, SUMMARY, read_object, read_yaml
from flowrl.runs.metrics import read_figures

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


@dataclass(frozen=True)
class Run:
    """One run: `config` maps dotted keys to texts, `rows` are those of metrics.csv, `images` its
    grids in order, `changes` the keys that were changed when it was resumed.
    """

    label: str
    config: Mapping[str, str]
    rows: Sequence[Mapping[str, float]]
    summary: Mapping[str, Any]
    images: Sequence[Path]
    changes: Sequence[Change] = ()

    @property
    def seed(self) -> str:
        """The run's seed as text, `?` where its configuration has none."""
        return self.config.get("seed", "?")

    @property
    def status(self) -> str:
        """The status that summary.json states; without one the run is still going or was killed."""
        return str(self.summary.get("status", "unfinished"))

    def curve(self, metric: str) -> list[tuple[float, float]]:
        """Return (iteration, value) wherever the metric was logged.

        The evaluation before training is logged with iteration 1 and belongs to iteration 0, unless
        every iteration is evaluated.
        """
        points = [(row["iteration"], row[metric]) for row in self.rows if metric in row]
        is_start = metric.startswith("eval/") and points and points[0][0] == 1
        if is_start and self.config.get("viewing.every") != "1":
            points[0] = (0.0, points[0][1])
        return points

    def final(self, metric: str) -> float:
        """Return the last value of a metric, NaN without one; the evaluation before training is
        none.
        """
        points = self.curve(metric)
        return points[-1][1] if points and points[-1][0] > 0 else math.nan

    @property
    def metrics(self) -> list[str]:
        """The names of all logged metrics, in the order of metrics.csv."""
        return list(dict.fromkeys(name for row in self.rows for name in row))


def find(places: Iterable[Path]) -> list[Run]:
    """Read all runs in or below the given folders, by path. Raises UserError where there is
    none.
    """
    folders: list[Path] = []
    for place in places:
        with_config = {path.parent for path in place.rglob(CONFIG)}
        # A run's own subfolders (trackers, checkpoints) hold no runs.
        outermost = [folder for folder in with_config if with_config.isdisjoint(folder.parents)]
        if not outermost:
            raise UserError(
                f"{place}: no run there; give folders of runs, which hold a {CONFIG}, or of sweeps"
            )
        outermost.sort(key=_natural)
        folders += [folder for folder in outermost if folder not in folders]
    names = _labels(folders)
    return [read(folder, name) for folder, name in zip(folders, names, strict=True)]


def read(folder: Path, label: str) -> Run:
    """Read one run; what is missing, and a last row cut short by a kill, is left out.

    Raises UserError, naming the file, for one that is damaged: figures are compared whole or not at
    all.
    """
    remedy = "restore it, or leave this run out"
    config = read_yaml(folder / CONFIG, remedy)
    summary = _read_if_there(folder / SUMMARY, remedy)
    record = _read_if_there(folder / PROVENANCE, remedy)
    figures = read_figures(folder / METRICS)
    if figures.problem:
        raise UserError(f"{folder / METRICS} is damaged ({figures.problem}); {remedy}")
    rows = []
    for texts in figures.rows:
        numbers = {name: float(text) for name, text in texts.items() if text}
        rows.append({name: number for name, number in numbers.items() if math.isfinite(number)})
    images = sorted(path for path in (folder / "images").glob("*.png") if path.stem.isdigit())
    changes = read_changes(record, folder / PROVENANCE)
    return Run(label, dict(flatten(config)), rows, summary, images, changes)


def _read_if_there(path: Path, remedy: str) -> dict[str, Any]:
    return read_object(path, remedy) if path.is_file() else {}


def flatten(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, text) of every leaf of a configuration; a list is one leaf."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value_text(node)


def value_text(value: Any) -> str:
    """Return a value as users write it: 1e-5, true, null."""
    # YAML 1.1 reads 1e-5 as text.
    if isinstance(value, str) and not ("e" in value and _NUMBER.fullmatch(value)):
        return value
    if isinstance(value, str | float):
        plain = repr(float(value))
        scientific = format(Decimal(plain).normalize(), "e")
        return scientific if len(scientific) < len(plain) and abs(float(value)) < 1 else plain
    return json.dumps(value)


def _natural(path: Path) -> list[tuple[int, str]]:
    pieces = re.findall(r"(\D*)(\d*)", str(path))
    return [(int(digits or 0), word) for word, digits in pieces]


def _labels(folders: Sequence[Path]) -> list[str]:
    """Return the shortest tails of the paths that tell them apart."""
    paths = [folder.absolute().parts for folder in folders]
    for length in range(1, max(map(len, paths), default=1)):
        tails = ["/".join(path[-length:]) for path in paths]
        if len(set(tails)) == len(paths):
            return tails
    return [path[-1] for path in paths]
