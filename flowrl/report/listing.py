"""A list of runs, one line each: what became of a run, how far it is, and what it has gained."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flowrl.errors import UserError
from flowrl.report.runs import Run, read
from flowrl.runs.description import method_of
from flowrl.runs.files import CONFIG, METRICS, SUMMARY, read_yaml
from flowrl.runs.folder import is_claimed

RUNNING = "running"
DAMAGED = "damaged"
HEADS = ("state", "done", "method", "seed", "headline", "time")


@dataclass(frozen=True, slots=True)
class Entry:
    """A run of the list. What is not known is None; `problem` says why a damaged one cannot be
    read.

    `before` and `after` are the scores of `headline` on the first set of evaluation prompts, at the
    start and at the last evaluation; `written` is when its files were last written, in seconds
    since 1970.
    """

    folder: str
    state: str
    written: float
    iterations: int | None = None
    num_iterations: int | None = None
    method: str | None = None
    seed: int | str | None = None
    headline: str | None = None
    before: float | None = None
    after: float | None = None
    seconds: float | None = None
    problem: str | None = None


def entry(folder: Path) -> Entry:
    """Read a run for the list; one that cannot be read is an entry too, with the reason."""
    place = str(folder.absolute())
    written = _written(folder)
    try:
        run = read(folder, folder.name)
        config = read_yaml(folder / CONFIG, "restore it")
        headline = run.config.get("evaluation.headline")
        return Entry(
            place,
            _state(run, folder),
            written,
            iterations=_iterations(run),
            num_iterations=_whole(config.get("num_iterations")),
            method=method_of(config).name,
            seed=config.get("seed"),
            headline=headline,
            before=_score(run, headline, "before"),
            after=_score(run, headline, "after"),
            seconds=_number(run.summary.get("seconds")),
        )
    except (UserError, OSError) as error:
        return Entry(place, DAMAGED, written, problem=" ".join(str(error).split()))


def _written(folder: Path) -> float:
    """Return when a run's files were last written; 0 where none can be asked."""
    times = [0.0]
    for name in (CONFIG, METRICS, SUMMARY):
        try:
            times.append((folder / name).stat().st_mtime)
        except OSError:
            continue  # not written yet, or not readable, which reading it tells
    return max(times)


def _state(run: Run, folder: Path) -> str:
    """Return the status of a run's summary, or whether a process is at it."""
    if run.summary:
        return run.status
    return RUNNING if is_claimed(folder) else run.status


def _iterations(run: Run) -> int:
    """Return the iterations that are done: those of the summary, or of the last row."""
    done = _whole(run.summary.get("iterations"))
    if done is None:
        done = int(run.rows[-1]["iteration"]) if run.rows else 0
    return done


def _score(run: Run, headline: str | None, when: str) -> float | None:
    """Return the headline of the evaluation `before` or `after` training; of a run that goes on,
    that of the first or of the last evaluation so far.
    """
    if headline is None:
        return None
    evaluations = run.summary.get("eval")
    if isinstance(evaluations, Mapping) and isinstance(evaluations.get(when), Mapping):
        return _number(evaluations[when].get(headline))
    points = _curve(run, headline)
    if when == "before":
        return points[0][1] if points and points[0][0] == 0 else None
    return points[-1][1] if points and points[-1][0] > 0 else None


def _curve(run: Run, headline: str) -> list[tuple[float, float]]:
    """Return the logged scores of the headline on the first set that has it."""
    for name in run.metrics:
        if name.startswith("eval/") and name.split("/", 2)[2] in (headline, f"part/{headline}"):
            return run.curve(name)
    return []


def _number(value: Any) -> float | None:
    """Return a finite number as it is, None for anything else that may stand in a file."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def as_json(entries: Sequence[Entry]) -> str:
    """Return the entries as JSON, null for what is not known."""
    return json.dumps([asdict(entry) for entry in entries], indent=2)


def as_lines(entries: Sequence[Entry], root: Path, width: int | None) -> list[str]:
    """Return the table, a line each with the folder last, from `root`; with a `width` that this
    does not fit into, the folders stand on lines of their own.
    """
    rows = [HEADS, *map(_cells, entries)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    folders = ["folder", *(_from(Path(entry.folder), root) for entry in entries)]
    problems = [None, *(entry.problem for entry in entries)]
    is_narrow = width is not None and sum(widths) + 2 * len(widths) + max(map(len, folders)) > width
    lines = []
    for row, folder, problem in zip(rows, folders, problems, strict=True):
        cells = [text.ljust(size) for text, size in zip(row, widths, strict=True)]
        line = "  ".join(cells)
        lines += [line.rstrip(), f"    {folder}"] if is_narrow else [f"{line}  {folder}"]
        if problem is not None:
            lines.append(f"    {problem}")
    return lines


def _from(folder: Path, root: Path) -> str:
    """Return a folder as it is reached from where the list is asked for."""
    absolute = root.absolute()
    return str(folder.relative_to(absolute)) if folder.is_relative_to(absolute) else str(folder)


def _cells(entry: Entry) -> tuple[str, ...]:
    """Return a row of the table, `-` for what is not known."""
    done = "-"
    if entry.iterations is not None:
        done = f"{entry.iterations}/{_or_dash(entry.num_iterations)}"
    return (
        entry.state,
        done,
        _or_dash(entry.method),
        _or_dash(entry.seed),
        _headline(entry),
        _time(entry.seconds),
    )


def _headline(entry: Entry) -> str:
    """Return the headline's name and its scores, such as `strict 0.214 -> 0.655`."""
    if entry.before is None and entry.after is None:
        return "-"
    scores = ["?" if score is None else f"{score:.3g}" for score in (entry.before, entry.after)]
    return f"{entry.headline} {' -> '.join(scores)}"


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)


def _time(seconds: float | None) -> str:
    """Return a duration in the two units that matter."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
