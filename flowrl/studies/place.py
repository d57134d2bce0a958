"""Where a study's runs and its record are, and what is known of a run that a plan asks for."""

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
        """The plan of a study. Raises UserError for an unknown one."""
        return read(name, self.plans, self.is_quick)

    def runs(self, name: str) -> Path:
        """The folder of a study's sweep."""
        return self.root / name / RUNS

    def results(self, name: str) -> Path:
        """The file of a study's record."""
        return self.records / name / RESULTS

    @property
    def recorded(self) -> dict[frozenset[str], Record]:
        """Every run in a record, by its overrides."""
        paths = sorted(self.records.glob(f"*/{RESULTS}"))
        return {frozenset(run["overrides"]): run for path in paths for run in load(path)["runs"]}

    def folders(self, name: str) -> dict[frozenset[str], Path]:
        """The folders of a study's sweep, by their jobs' overrides."""
        return _by_overrides(self.runs(name).glob(f"*/{STATUS}"))

    @property
    def every_folder(self) -> dict[frozenset[str], Path]:
        """The folders of all studies here: one may share the runs of another."""
        return _by_overrides(self.root.glob(f"*/{RUNS}/*/{STATUS}"))

    def find(self, name: str, wanted: Sequence[Planned]) -> dict[Planned, Record]:
        """The records of those runs that are over: from their folders, or else from what was
        recorded earlier.
        """
        folders = self.folders(name)
        recorded = self.recorded
        found = {}
        for planned in wanted:
            key = frozenset(planned.overrides)
            known = from_folder(planned, folders[key]) if key in folders else None
            if known is None and key in recorded:
                own = {"stage": planned.stage, "method": planned.method, "variant": planned.variant}
                known = recorded[key] | own
            if known is not None:
                found[planned] = known
        return found

    def tuned(self, study: Study) -> dict[str, dict[str, Any]]:
        """What the study's own tuning stage chose, of each method whose runs of it are all over."""
        for stage in study.stages:
            if stage.chooses:
                runs = stage.runs({})
                records = self.find(study.name, runs)
                own = stage.of(
                    set(stage.methods) - {run.method for run in runs if run not in records}
                )
                return choose(own, own.runs({}), records)
        return {}

    def chosen(self, name: str) -> dict[str, Overrides]:
        """Each method's tuned overrides, from the study `name`: that of this place, or else the
        committed record's.
        """
        path = self.root / name / TUNED
        if path.is_file():
            chosen = read_object(path, "remove it, and it is chosen anew")
        else:
            chosen = (
                load(self.results(name)).get("tuned")
                or load(self.plans / name / RESULTS).get("tuned")
                or {}
            )
        return {method: tuple(own["overrides"]) for method, own in chosen.items()}

    def planned(self, study: Study) -> list[Planned]:
        """All runs that can be listed: those of a method that waits for its tuning cannot."""
        runs: list[Planned] = []
        for stage in study.stages:
            chosen = self.chosen(stage.tuned) if stage.tuned else {}
            runs += (stage.of(chosen) if stage.tuned else stage).runs(chosen)
        return runs


def _by_overrides(paths: Iterable[Path]) -> dict[frozenset[str], Path]:
    """The folders of jobs by what they ran."""
    return {frozenset(read_status(path)["overrides"]): path.parent for path in sorted(paths)}
