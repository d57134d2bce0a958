"""Which jobs a sweep has, and which of them a folder holds already."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from flowrl.errors import UserError
from flowrl.runs.files import write_whole
from flowrl.sweep.job import STATUS, TRUSTED, Job, has_key

SWEEP = "sweep.json"
Overrides = tuple[str, ...]


def find_sweep(wanted: Sequence[Overrides]) -> tuple[Path, list[Overrides]] | None:
    """The folder and jobs of an earlier sweep, where `resume=FOLDER`, perhaps trusted, is all that is asked for.

    Raises ValueError where `resume` stands among other overrides or names no sweep.
    """
    if not any(has_key(overrides, "resume") for overrides in wanted):
        return None
    asked = [override for override in wanted[0] if override != TRUSTED]
    if len(wanted) > 1 or len(asked) > 1:
        raise UserError("resume= in a sweep stands alone: it continues the jobs of that folder with their overrides")
    folder = Path(asked[0].split("=", 1)[1]).resolve()
    if not (folder / SWEEP).is_file():
        raise UserError(f"resume={folder}: no {SWEEP} there; give the folder of an earlier sweep")
    return folder, [tuple(overrides) for overrides in json.loads((folder / SWEEP).read_text())]


def write_sweep(folder: Path, wanted: Sequence[Overrides], is_new: bool) -> None:
    """Keep the sweep's jobs, so that it can be continued by its folder; a later batch adds to them."""
    known = [] if is_new or not (folder / SWEEP).is_file() else json.loads((folder / SWEEP).read_text())
    jobs = [*known, *(list(overrides) for overrides in wanted if list(overrides) not in known)]
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / SWEEP, json.dumps(jobs, indent=2) + "\n")


def match(folder: Path, wanted: Sequence[Overrides], sizes: Sequence[tuple[int, int]]) -> list[Job]:
    """The jobs: those that `folder` holds, by their overrides whatever the order, and new ones numbered on.

    Sizes are (processes, iterations). A job whose run has finished is so marked; all others wait.
    """
    known: dict[frozenset[str], tuple[int, float]] = {}
    for path in folder.glob(f"*/{STATUS}"):
        status = json.loads(path.read_text())
        known[frozenset(status["overrides"])] = status["number"], status["seconds"]
    fresh = max((number for number, _ in known.values()), default=-1) + 1
    jobs = []
    for overrides, (num_processes, num_iterations) in zip(wanted, sizes, strict=True):
        number, seconds = known.get(frozenset(overrides), (fresh, 0.0))
        fresh += number == fresh
        job = Job(number, overrides, folder / str(number), num_processes, num_iterations, seconds=seconds)
        job.state = "finished" if job.is_finished else "waiting"
        jobs.append(job)
    return jobs
