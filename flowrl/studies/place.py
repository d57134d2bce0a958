"""The place of a study's runs and of its record, and what is known there of a run that a plan asks
for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowrl.runs.files import read_object
from flowrl.studies.choice import choose
from flowrl.studies.plan import Overrides, Planned, Study, read
from flowrl.studies.record import Record, from_folder, load
from flowrl.sweep.job import STATUS
from flowrl.sweep.plan import read_status

RESULTS = "results.json"
TUNED = "tuned.json"
RUNS = "runs"


@dataclass(frozen=True)
class Place:
    """`plans` holds the studies' sweep.yaml, `root` their runs, `records` their results.json.

    A run is known by its overrides alone: one that stands in the record of any study here is not
    run again, wherever its folder has gone, so a study can be run over many sittings and machines.
    """

    plans: Path
    root: Path
    records: Path
    is_quick: bool = False

    def study(self, name: str) -> Study:
        """Read the plan of a study. Raises UserError for an unknown one."""
        return read(name, self.plans, self.is_quick)

    def runs(self, name: str) -> Path:
        """Return the folder of a study's sweep."""
        return self.root / name / RUNS

    def results(self, name: str) -> Path:
        """Return the file of a study's record."""
        return self.records / name / RESULTS

    @property
    def recorded(self) -> dict[frozenset[str], Record]:
        """Every run in a record, by its overrides."""
        runs = {}
        # In a fixed order, since of two records of one run the later one counts.
        for path in sorted(self.records.glob(f"*/{RESULTS}")):
            for run in load(path)["runs"]:
                runs[frozenset(run["overrides"])] = run
        return runs

    def folders(self, name: str) -> dict[frozenset[str], Path]:
        """Return the folders of a study's sweep, by their jobs' overrides."""
        return _by_overrides(self.runs(name).glob(f"*/{STATUS}"))

    @property
    def every_folder(self) -> dict[frozenset[str], Path]:
        """The folders of all studies here: one may share the runs of another."""
        return _by_overrides(self.root.glob(f"*/{RUNS}/*/{STATUS}"))

    def find(self, name: str, wanted: Sequence[Planned]) -> dict[Planned, Record]:
        """Return the records of those runs that are over: from their folders, or else from what was
        recorded earlier.
        """
        folders = self.folders(name)
        recorded = self.recorded
        records = {}
        for planned in wanted:
            key = frozenset(planned.overrides)
            record = None
            if key in folders:
                record = from_folder(planned, folders[key])
            if record is None and key in recorded:
                # Another study may have run it under names of its own.
                names = {
                    "stage": planned.stage,
                    "method": planned.method,
                    "variant": planned.variant,
                }
                record = recorded[key] | names
            if record is not None:
                records[planned] = record
        return records

    def tuned(self, study: Study) -> dict[str, dict[str, Any]]:
        """Return what the study's own tuning stage chose, of each method whose runs of it are all
        over.
        """
        for stage in study.stages:
            if stage.chooses:
                # The stage that tunes takes nothing that was tuned.
                runs = stage.runs({})
                records = self.find(study.name, runs)
                # `choose` refuses a stage that is not over, so it gets the methods that are.
                unfinished = {run.method for run in runs if run not in records}
                over = stage.of(set(stage.methods) - unfinished)
                return choose(over, over.runs({}), records)
        return {}

    def chosen(self, name: str) -> dict[str, Overrides]:
        """Return each method's tuned overrides, from the study `name`: that of this place, or else
        the committed record's.
        """
        path = self.root / name / TUNED
        if path.is_file():
            chosen = read_object(path, "remove it, and it is chosen anew")
        else:
            chosen = load(self.results(name)).get("tuned") or {}
            if not chosen:
                # A study run anew, in another place, builds on the tuning that is published.
                chosen = load(self.plans / name / RESULTS).get("tuned") or {}
        return {method: tuple(choice["overrides"]) for method, choice in chosen.items()}

    def planned(self, study: Study) -> list[Planned]:
        """List all runs that can be listed: those of a method that waits for its tuning cannot."""
        runs: list[Planned] = []
        for stage in study.stages:
            chosen = self.chosen(stage.tuned) if stage.tuned else {}
            runs += (stage.of(chosen) if stage.tuned else stage).runs(chosen)
        return runs


def _by_overrides(paths: Iterable[Path]) -> dict[frozenset[str], Path]:
    """Return the folders of jobs by what they ran, given the paths of their status files."""
    folders = {}
    for path in sorted(paths):
        status = read_status(path)
        folders[frozenset(status["overrides"])] = path.parent
    return folders
