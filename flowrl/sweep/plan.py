"""The jobs of a sweep, and those of them that a folder holds already."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowrl.errors import UserError
from flowrl.runs.files import damaged, read_json, read_object, write_whole
from flowrl.runs.installation import TRAIN
from flowrl.sweep.job import STATUS, Job, has_key

SWEEP = "sweep.json"
DAMAGED = "remove it, and start the sweep again with its overrides: finished runs stay"
"""What to do about a file of a sweep that cannot be read."""
Overrides = tuple[str, ...]


@dataclass(frozen=True)
class Sweep:
    """A sweep as its folder tells it: the script and the working directory of its jobs, and their
    overrides.
    """

    script: Path
    directory: Path
    jobs: tuple[Overrides, ...]


@dataclass(frozen=True)
class Place:
    """The place of a job, which is its number, its folder where it has one already, and how long it
    has run.
    """

    number: int
    folder: Path | None = None
    seconds: float = 0.0


def read_sweep(folder: Path) -> Sweep:
    """Read the sweep in `folder`. Raises UserError where there is none, or its file is damaged."""
    if not (folder / SWEEP).is_file():
        raise UserError(f"resume={folder}: no {SWEEP} there; give the folder of an earlier sweep")
    record = _record(folder)
    jobs = [tuple(job["overrides"]) for job in record["jobs"]]
    return Sweep(
        script=Path(record["script"]),
        directory=Path(record["directory"]),
        jobs=tuple(jobs),
    )


def _record(folder: Path) -> dict[str, Any]:
    """Read the file of a sweep; that of earlier versions is a list of overrides, begun by train.py
    in an unknown place.
    """
    path = folder / SWEEP
    # No file counts as an earlier version's without any job.
    record = read_json(path, DAMAGED) if path.is_file() else []
    if isinstance(record, list):
        jobs = [{"overrides": overrides, "number": None, "folder": None} for overrides in record]
        record = {"script": str(TRAIN), "directory": str(Path.cwd()), "jobs": jobs}
    # Checked in full, since the file may come from elsewhere or be edited by hand.
    _check(record, {"script": str, "directory": str, "jobs": list}, path)
    for job in record["jobs"]:
        _check(job, {"overrides": list, "number": int | None, "folder": str | None}, path)
        # Those of an earlier version are found by the status files in their folders.
        if job["number"] is not None and job["folder"] is None:
            raise damaged(path, f"job {job['number']} has no folder", DAMAGED)
    return record


def read_status(path: Path) -> dict[str, Any]:
    """Read the status file of a job. Raises UserError for a damaged one."""
    status = read_object(path, DAMAGED)
    _check(status, {"overrides": list, "number": int, "seconds": float | int}, path)
    return status


def _check(entry: object, kinds: Mapping[str, Any], path: Path) -> None:
    """Raise UserError, naming the file, unless an entry is an object with values of these kinds,
    texts as overrides.
    """
    if not isinstance(entry, dict):
        raise damaged(path, f"{json.dumps(entry)} stands where an object was expected", DAMAGED)
    for key, kind in kinds.items():
        if key not in entry or not isinstance(entry[key], kind):
            raise damaged(path, f"{key} is {json.dumps(entry.get(key))}", DAMAGED)
    if not all(isinstance(override, str) for override in entry.get("overrides", [])):
        raise damaged(path, "overrides must be texts", DAMAGED)


def write_sweep(
    folder: Path,
    jobs: Sequence[Job],
    is_new: bool,
    script: Path = TRAIN,
    directory: Path | None = None,
) -> None:
    """Keep the sweep's jobs, so that it can be continued by its folder; a later batch adds to
    them.

    `directory` is the jobs' working directory, by default this process's.
    """
    entries = []
    for job in jobs:
        entry = {
            "number": job.number,
            # Relative, so that the sweep's folder may be moved.
            "folder": str(job.folder.relative_to(folder)),
            "overrides": list(job.overrides),
        }
        entries.append(entry)
    # A sweeper such as Optuna launches batch after batch into one folder.
    earlier = [] if is_new else _record(folder)["jobs"]
    new = [entry["overrides"] for entry in entries]
    others = [entry for entry in earlier if entry["overrides"] not in new]
    record = {
        "script": str(script),
        "directory": str(directory or Path.cwd()),
        "jobs": [*others, *entries],
    }
    text = json.dumps(record, indent=2, ensure_ascii=False)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / SWEEP, f"{text}\n")


def find_places(folder: Path, wanted: Sequence[Overrides]) -> list[Place]:
    """Find the place of each job: that of the job in `folder` with the same overrides in any order,
    or a new number.
    """
    known = _known_places(folder)
    numbers = [place.number for place in known.values()]
    fresh = max(numbers, default=-1) + 1
    places = []
    for overrides in wanted:
        place = known.get(frozenset(overrides))
        if place is None:
            place = Place(fresh)
            fresh += 1
        places.append(place)
    return places


def _known_places(folder: Path) -> dict[frozenset[str], Place]:
    """Return the places of the jobs that `folder` holds, by their overrides."""
    known: dict[frozenset[str], Place] = {}
    for entry in _record(folder)["jobs"]:
        if entry["number"] is not None:
            key = frozenset(entry["overrides"])
            known[key] = Place(entry["number"], folder / entry["folder"])
    # A job that has begun tells besides how long it ran; in a moved folder this is where it lies.
    for path in folder.rglob(STATUS):
        status = read_status(path)
        key = frozenset(status["overrides"])
        known[key] = Place(status["number"], path.parent, status["seconds"])
    return known


def match(folder: Path, wanted: Sequence[Overrides], sizes: Sequence[tuple[int, int]]) -> list[Job]:
    """Make jobs that train.py composes by itself: those that `folder` holds, and new ones numbered
    on.

    Sizes are (processes, iterations). A job whose run has finished is so marked; all others wait.
    """
    jobs = []
    places = find_places(folder, wanted)
    for overrides, place, (num_processes, num_iterations) in zip(
        wanted, places, sizes, strict=True
    ):
        job = Job(
            number=place.number,
            overrides=overrides,
            folder=place.folder or folder / str(place.number),
            num_processes=num_processes,
            num_iterations=num_iterations,
            has_threads=has_key(overrides, "num_threads"),
            seconds=place.seconds,
        )
        job.state = "finished" if job.is_finished else "waiting"
        jobs.append(job)
    return jobs
