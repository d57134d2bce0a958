"""One job of a sweep: its folder and status file, and how `train.py` is called for it."""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowrl.runs.command_line import key_of, override
from flowrl.runs.files import CONFIG, METRICS, SUMMARY, read_object, write_whole
from flowrl.runs.installation import COMMAND

STATUS = "job.json"
LOG = "job.log"
COMPOSED = "job.yaml"
"""The configuration that the job starts from, as its sweep composed it."""
TRUSTED = "++trust_folder=true"
"""The override for a resumed run whose folder was checked, or is trusted; a script of one's own may
lack the key.
"""

DAMAGED = "remove it, and the run is gone on with from its newest checkpoint"
"""What to do about a summary that cannot be read."""
# Variables by which a launcher tells a process its place among others. A job that inherited them
# would wait for processes that do not exist, or log into its parent's W&B run.
FOREIGN = (
    "RANK",
    "LOCAL_RANK",
    "NODE_RANK",
    "GROUP_RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
SLURM_TASK = ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")
WANDB_RUN = ("WANDB_RUN_ID", "WANDB_NAME", "WANDB_RUN_GROUP", "WANDB_SWEEP_ID")


class JobsFailed(ChildProcessError):
    """Some jobs of a sweep did not finish."""


@dataclass
class Job:
    """A run of `train.py` with `overrides` in `folder`, as `num_processes` ranks.

    `composed` is the text of the configuration that it starts from; without one `train.py` composes
    the overrides. `has_threads` says that the configuration has a number of threads already.
    `state` is waiting, running, finished, failed or stopped; `devices` are the slots it has or had.
    `is_trusted` says that what its folder holds is known, or was checked, so that a run there is
    continued without being checked again.
    """

    number: int
    overrides: tuple[str, ...]
    folder: Path
    num_processes: int
    num_iterations: int
    composed: str | None = None
    has_threads: bool = False
    state: str = "waiting"
    devices: tuple[str, ...] = ()
    seconds: float = 0.0
    problem: str = ""
    is_trusted: bool = False

    def prepare(self) -> None:
        """Write the composed configuration, unless the run has begun: then it continues as it was
        composed.
        """
        if self.composed is not None and not self.is_begun:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / COMPOSED, self.composed)

    def write(self) -> None:
        """Write the status file, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        status = {
            "number": self.number,
            "overrides": self.overrides,
            "state": self.state,
            "devices": self.devices,
            "seconds": round(self.seconds, 1),
            "problem": self.problem,
            "written": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        write_whole(self.folder / STATUS, json.dumps(status, indent=2) + "\n")

    @property
    def is_finished(self) -> bool:
        """Tell whether the run itself says that it has finished: it writes its summary last.

        Raises UserError for a damaged summary.
        """
        summary = self.folder / SUMMARY
        if not summary.is_file():
            return False
        return read_object(summary, DAMAGED).get("status") == "finished"

    def progress(self) -> tuple[int, str]:
        """Return the number of finished iterations, and the last one's mean reward as text."""
        try:
            lines = (self.folder / METRICS).read_text().splitlines()
            last = list(csv.DictReader(lines))[-1]
            reward = float(last["reward/mean"])
            return int(last["iteration"]), f"{reward:.3f}"
        except (OSError, IndexError, KeyError, ValueError, TypeError):
            # The run has not begun, or a line is half written.
            return 0, ""

    @property
    def is_begun(self) -> bool:
        """Tell whether the folder holds a run, which can be continued."""
        return (self.folder / CONFIG).is_file()

    def arguments(self, num_threads: int | None) -> list[str]:
        """Return flags and single-run overrides: for a new run in the folder, or for the
        continuation of the one that it holds.
        """
        threads = []
        if num_threads is not None and not self.has_threads:
            threads = [f"num_threads={num_threads}"]
        flags = []
        if (self.folder / COMPOSED).is_file():
            flags = ["--config-path", str(self.folder), "--config-name", Path(COMPOSED).stem]
        if self.is_begun:
            trust = [TRUSTED] if self.is_trusted else []
            return [*flags, override("resume", str(self.folder)), *trust, *threads]
        # The file says all that the overrides do, and where the run writes.
        if flags:
            return [*flags, *threads]
        return [*self.overrides, *threads, override("run_dir", str(self.folder))]


def has_key(overrides: Iterable[str], key: str) -> bool:
    """Tell whether one of the overrides sets `key`."""
    return key in map(key_of, overrides)


def environment(group: str) -> dict[str, str]:
    """Return this process's environment without what would make a job think it is part of it; its
    W&B group is the sweep.
    """
    left_out = (*FOREIGN, *SLURM_TASK, *WANDB_RUN)
    variables = {}
    for name, value in os.environ.items():
        if name not in left_out and "TORCHELASTIC" not in name:
            variables[name] = value
    variables["WANDB_RUN_GROUP"] = group
    return variables


def command(arguments: Sequence[str], script: Path) -> list[str]:
    """Return the command that starts a rank.

    FlowRL's command is called as a module: Python would take the modules beside the script, such as
    `report.py`, for packages of these names.
    """
    if script == COMMAND:
        return [sys.executable, "-m", "flowrl", "train", *arguments]
    return [sys.executable, str(script), *arguments]


def num_ranks(devices: int | str | Sequence[int]) -> int:
    """Count the processes that `trainer.devices` makes, a number or a list; `auto` is 1."""
    if isinstance(devices, str):
        return int(devices) if devices.isdigit() else 1
    return devices if isinstance(devices, int) else len(devices)


def objective(folder: Path, name: str) -> float | None:
    """Return what a sweeper optimises: a score of the evaluation after training, None where that
    has no such score.
    """
    node: Any = read_object(folder / SUMMARY, DAMAGED)
    for key in ("eval", "after", name):
        node = node.get(key) if isinstance(node, dict) else None
    return float(node) if isinstance(node, float | int) else None
