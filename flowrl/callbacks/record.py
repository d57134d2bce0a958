"""The run's machine-readable record: metrics.csv, one row an iteration, and summary.json at the
end.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import platform
import re
import resource
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from flowrl.callbacks.trackers import alert
from flowrl.parallel.strategies import is_later_rank
from flowrl.runs.files import METRICS, SUMMARY, set_aside, write_whole
from flowrl.runs.metrics import ITERATION, read_figures
from flowrl.runs.provenance import environment
from flowrl.training.policy import Policy
from flowrl.values.units import GIB

_STATUS = Path("/proc/self/status")
_CLEAR_PEAK = Path("/proc/self/clear_refs")
_CPU = Path("/proc/cpuinfo")

SPEED = "perf/images_per_second"

log = logging.getLogger(__name__)


class RunRecord(Callback):
    """The owner of metrics.csv and summary.json of `folder`; evaluations hand their metrics in
    through `add`.
    """

    def __init__(self, *, folder: str) -> None:
        self.folder = Path(folder)
        self.rows: list[dict[str, Any]] = []
        self.evaluations: dict[str, dict[str, Any]] = {}
        self.pending: dict[str, float] = {}
        self.seconds_before = 0.0
        self.start = time.perf_counter()
        self.device: str | None = None
        self.error: str | None = None
        reset_peak_memory()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.evaluations.pop("after", None)  # of an end that was none

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # An earlier end's, for which a killed resumption must not be taken.
        if trainer.is_global_zero:
            (self.folder / SUMMARY).unlink(missing_ok=True)
        # Now, since Lightning takes the policy off its device at the end.
        if pl_module.device.type == "cuda":
            self.device = torch.cuda.get_device_name(pl_module.device)
        else:
            self.device = processor_name()

    @property
    def csv_path(self) -> Path:
        """The file of metrics, which the first process alone writes."""
        return self.folder / METRICS

    def add(self, when: str, metrics: dict[str, float], headline: dict[str, Any]) -> None:
        """Take an evaluation's metrics into the next row, and its headline as `eval.<when>` of the
        summary.
        """
        self.pending |= metrics
        self.evaluations[when] = headline

    def restore(self, num_iterations: int, state: dict[str, Any]) -> None:
        """Continue the record of a stopped run: drop the rows its checkpoint does not know.

        Where some of the others are missing or damaged, the file as it is is kept under another
        name.
        """
        figures = read_figures(self.csv_path)
        self.rows = [dict(row) for row in figures.rows if int(row[ITERATION]) <= num_iterations]
        if len(self.rows) < num_iterations:
            # The run goes on all the same: its weights do not depend on what was logged.
            self._warn_of_lost_rows(num_iterations, figures.problem)
        # Of a checkpoint of an earlier version, or one that was edited, the record may lack these.
        evaluations = state.get("evaluations")
        self.evaluations = evaluations if isinstance(evaluations, dict) else {}
        seconds = state.get("seconds")
        self.seconds_before = float(seconds) if isinstance(seconds, float | int) else 0.0
        self._write_csv()

    def _warn_of_lost_rows(self, num_iterations: int, problem: str) -> None:
        """Keep the file as it is under another name, and say how many rows are left of it."""
        place = ""
        if self.csv_path.is_file():
            kept = self._keep("unreadable")
            place = f"; it is kept as {kept.name}"
            problem = problem or "rows are missing"
        else:
            problem = "the file is gone"
        log.warning(
            "%s: %s: the rows of %d of the first %d iterations are left%s",
            self.csv_path,
            problem,
            len(self.rows),
            num_iterations,
            place,
        )

    def start_anew(self) -> None:
        """Keep what an earlier start without a checkpoint has recorded, before the first row is
        written again.
        """
        if self.csv_path.is_file() and not is_later_rank():
            kept = self._keep("before")
            log.warning(
                "no checkpoint yet: starting from the beginning; %s is kept as %s",
                self.csv_path,
                kept.name,
            )

    def _keep(self, kind: str) -> Path:
        """Rename metrics.csv and return its new path; the first process alone does so."""
        if is_later_rank():
            return self.csv_path
        return set_aside(self.csv_path, kind)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the record, for `restore`."""
        return {"evaluations": self.evaluations, "seconds": self.seconds}

    @property
    def seconds(self) -> float:
        """Return the wall time of the run over all its parts, set-up and evaluations included."""
        return self.seconds_before + time.perf_counter() - self.start

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Policy)
        row = pl_module.last_metrics | self.pending
        self.pending = {}
        # The first row has all columns, as `_write_csv` sees to.
        has_new_columns = not self.rows or not row.keys() <= self.rows[0].keys()
        # In every process: all of them ask for the number of rows where an evaluation fails.
        self.rows.append(row)
        if not trainer.is_global_zero:
            return
        if has_new_columns:
            self._write_csv()
        else:
            # A line more, since writing the whole file at each iteration takes ever longer.
            with self.csv_path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(self.rows[0]))
                writer.writerow(row)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.pending and self.rows:  # evaluated after the last iteration's row was written
            self.rows[-1] |= self.pending
            self.pending = {}
            self._write_csv()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if isinstance(exception, Exception):  # not the user's interrupt
            self.error = type(exception).__name__
            alert(trainer.loggers, type(exception).__name__, str(exception), level="ERROR")

    @rank_zero_only
    def _write_csv(self) -> None:
        """Write all rows, whole or not at all, under the columns of all of them."""
        if not self.rows:
            return
        # A dictionary, unlike a set, keeps the order in which the columns came.
        columns: dict[str, None] = {}
        for row in self.rows:
            columns |= dict.fromkeys(row)
        self.rows[0] = {name: self.rows[0].get(name, "") for name in columns}
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, columns)
        writer.writeheader()
        writer.writerows(self.rows)
        write_whole(self.csv_path, table.getvalue())

    def write_summary(self, policy: Policy, status: str) -> None:
        """Write summary.json: status, evaluations before and after, speed, memory, versions."""
        # The median iteration, so that the first one's warm-up and a busy moment do not count.
        speeds = sorted(float(row[SPEED]) for row in self.rows if row.get(SPEED))
        speed = round(speeds[len(speeds) // 2], 1) if speeds else None
        summary = {
            "status": status,
            "error": self.error,
            "iterations": policy.num_iterations,
            "images": policy.num_iterations * policy.scouting.num_drawn,
            "eval": self.evaluations,
            "seconds": round(self.seconds, 1),
            "images_per_second": speed,
            "peak_memory_gib": round(peak_memory_gib(), 3),
            **environment(),
            "device": self.device,
        }
        # What is no number is null: JSON knows neither NaN nor infinity.
        clean = json.loads(json.dumps(summary), parse_constant=lambda name: None)
        write_whole(self.folder / SUMMARY, json.dumps(clean, indent=2) + "\n")


def reset_peak_memory() -> None:
    """Start measuring the peak anew, so that the later jobs of a sweep in one process report their
    own.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif os.access(_CLEAR_PEAK, os.W_OK):
        # 5 sets VmHWM back to the memory that is resident now (proc(5)).
        _CLEAR_PEAK.write_text("5")


def peak_memory_gib() -> float:
    """Return the peak of allocated GPU memory, or of the process's resident memory on the CPU, in
    GiB.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    status = _STATUS.read_text() if _STATUS.is_file() else ""
    if match := re.search(r"VmHWM:\s+(\d+) kB", status):
        return int(match[1]) / 2**20
    # Without Linux's files, which unlike this number can be set back. It is in bytes on macOS and
    # in KiB elsewhere.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    units_per_gib = GIB if platform.system() == "Darwin" else 2**20
    return peak / units_per_gib


def processor_name() -> str:
    """Return the CPU's model where the system tells it, or its architecture."""
    text = _CPU.read_text() if _CPU.is_file() else ""
    if model := re.search(r"model name\s*:\s*(.+)", text):
        return model[1]
    return platform.processor() or platform.machine()
