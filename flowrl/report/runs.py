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

    A row maps the names of metrics to their values, and holds `iteration` besides; a metric that
    was not logged then, or was no finite number, is left out of it.
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
        if not points or not metric.startswith("eval/"):
            return points
        iteration, value = points[0]
        is_every_one_evaluated = self.config.get("viewing.every") == "1"
        if iteration == 1 and not is_every_one_evaluated:
            points[0] = (0.0, value)
        return points

    def final(self, metric: str) -> float:
        """Return the last value of a metric, NaN without one; the evaluation before training is
        none.
        """
        points = self.curve(metric)
        if not points:
            return math.nan
        iteration, value = points[-1]
        return value if iteration > 0 else math.nan

    @property
    def metrics(self) -> list[str]:
        """The names of all logged metrics, in the order of metrics.csv."""
        # A dictionary, as a set that keeps its order.
        names = dict.fromkeys(name for row in self.rows for name in row)
        return list(names)


def find(places: Iterable[Path]) -> list[Run]:
    """Read all runs in or below the given folders, by path, each labelled by the end of its path.

    A run that lies below two of the folders is read once. Raises UserError where there is none.
    """
    folders: list[Path] = []
    for place in places:
        folders += [folder for folder in folders_below(place) if folder not in folders]
    labels = _labels(folders)
    return [read(folder, label) for folder, label in zip(folders, labels, strict=True)]


def folders_below(place: Path) -> list[Path]:
    """List the folders of the runs in or below a folder, by path. Raises UserError where there is
    none.
    """
    with_config = {path.parent for path in place.rglob(CONFIG)}
    # A run's own subfolders (trackers, checkpoints) hold no runs.
    outermost = [folder for folder in with_config if with_config.isdisjoint(folder.parents)]
    if not outermost:
        raise UserError(
            f"{place}: no run there; give folders of runs, which hold a {CONFIG}, or of sweeps"
        )
    return sorted(outermost, key=_natural)


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
        # A cell is empty where its metric was not logged.
        numbers = {name: float(text) for name, text in texts.items() if text}
        finite = {name: number for name, number in numbers.items() if math.isfinite(number)}
        rows.append(finite)
    # Grids are named by their iteration, with leading zeros.
    pictures = (folder / "images").glob("*.png")
    images = sorted(path for path in pictures if path.stem.isdigit())
    changes = read_changes(record, folder / PROVENANCE)
    return Run(
        label=label,
        config=dict(flatten(config)),
        rows=rows,
        summary=summary,
        images=images,
        changes=changes,
    )


def _read_if_there(path: Path, remedy: str) -> dict[str, Any]:
    """Read a file that a run writes at its end or not at all; nothing where there is none yet."""
    return read_object(path, remedy) if path.is_file() else {}


def flatten(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, text) of every leaf of a configuration; a list is one leaf."""
    if isinstance(node, dict):
        for key, value in node.items():
            dotted = f"{prefix}.{key}" if prefix else str(key)
            yield from flatten(value, dotted)
    else:
        yield prefix, value_text(node)


def value_text(value: Any) -> str:
    """Return a value as users write it: 1e-5, true, null."""
    # YAML 1.1 reads 1e-5 as text.
    is_number = isinstance(value, str) and "e" in value and bool(_NUMBER.fullmatch(value))
    if isinstance(value, str) and not is_number:
        return value
    if isinstance(value, str | float):
        return _shortest(float(value))
    return json.dumps(value)


def _shortest(number: float) -> str:
    """Write a number so that it reads back the same: a small one as 1e-5 where that is shorter."""
    plain = repr(number)
    scientific = format(Decimal(plain).normalize(), "e")
    is_shorter = len(scientific) < len(plain)
    return scientific if is_shorter and abs(number) < 1 else plain


def _natural(path: Path) -> list[tuple[int, str]]:
    """Return what sorts paths with numbers by size: 2 before 10."""
    pieces = re.findall(r"(\D*)(\d*)", str(path))
    return [(int(digits or 0), word) for word, digits in pieces]


def _labels(folders: Sequence[Path]) -> list[str]:
    """Return the shortest tails of the paths that tell them apart, all of one number of folders."""
    paths = [folder.absolute().parts for folder in folders]
    longest = max(map(len, paths), default=1)
    for length in range(1, longest):
        tails = ["/".join(path[-length:]) for path in paths]
        if len(set(tails)) == len(paths):
            return tails
    return [path[-1] for path in paths]
