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
    """Read the sweep in `folder`. Raises UserError where there is none."""
    if not (folder / SWEEP).is_file():
        raise UserError(f"resume={folder}: no {SWEEP} there; give the folder of an earlier sweep")
    record = _record(folder)
    return Sweep(
        Path(record["script"]),
        Path(record["directory"]),
        tuple(tuple(job["overrides"]) for job in record["jobs"]),
    )


def _record(folder: Path) -> dict[str, Any]:
    """Read the file of a sweep; that of earlier versions is a list of overrides, begun by train.py
    in an unknown place.
    """
    path = folder / SWEEP
    record = read_json(path, DAMAGED) if path.is_file() else []
    if isinstance(record, list):
        jobs = [{"overrides": overrides, "number": None, "folder": None} for overrides in record]
        record = {"script": str(TRAIN), "directory": str(Path.cwd()), "jobs": jobs}
    _check(record, {"script": str, "directory": str, "jobs": list}, path)
    for job in record["jobs"]:
        _check(job, {"overrides": list, "number": int | None, "folder": str | None}, path)
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
    """
    entries = [
        {
            "number": job.number,
            "folder": str(job.folder.relative_to(folder)),
            "overrides": list(job.overrides),
        }
        for job in jobs
    ]
    earlier = [] if is_new else _record(folder)["jobs"]
    new = [entry["overrides"] for entry in entries]
    others = [entry for entry in earlier if entry["overrides"] not in new]
    record = {
        "script": str(script),
        "directory": str(directory or Path.cwd()),
        "jobs": [*others, *entries],
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / SWEEP, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def find_places(folder: Path, wanted: Sequence[Overrides]) -> list[Place]:
    """Find the place of each job: that of the job in `folder` with the same overrides in any order,
    or a new number.
    """
    known: dict[frozenset[str], Place] = {}
    for entry in _record(folder)["jobs"]:
        if entry["number"] is not None:
            known[frozenset(entry["overrides"])] = Place(entry["number"], folder / entry["folder"])
    for path in folder.rglob(STATUS):
        status = read_status(path)
        known[frozenset(status["overrides"])] = Place(
            status["number"], path.parent, status["seconds"]
        )
    fresh = max((place.number for place in known.values()), default=-1) + 1
    places = []
    for overrides in wanted:
        place = known.get(frozenset(overrides))
        if place is None:
            place = Place(fresh)
            fresh = fresh + 1
        places.append(place)
    return places


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
        path = place.folder or folder / str(place.number)
        job = Job(
            place.number, overrides, path, num_processes, num_iterations, seconds=place.seconds
        )
        job.has_threads = has_key(overrides, "num_threads")
        job.state = "finished" if job.is_finished else "waiting"
        jobs.append(job)
    return jobs
