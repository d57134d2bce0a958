"""A pool of device slots, and the loop that keeps them busy with jobs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from flowrl.errors import UserError
from flowrl.runs.installation import TRAIN
from flowrl.sweep.job import LOG, Job, command, environment
from flowrl.sweep.ranks import POLL_SECONDS, Ranks, StillRunning
from flowrl.sweep.table import LiveTable
from flowrl.values.bounds import Count
from flowrl.values.check import checked

NOTICES = (
    "stopping: the running jobs end after their iteration, with a checkpoint; {} again stops them "
    "at once",
    "stopping the running jobs at once",
)
"""What the first signal does, and the second."""


@dataclass(frozen=True)
class Slots:
    """Names of the devices; `threads` per process where they are CPU slots, None where they are
    GPUs.
    """

    names: tuple[str, ...]
    threads: int | None

    def variables(self, devices: Sequence[str]) -> dict[str, str]:
        """Return the variables that a job on `devices` finds in its environment."""
        if self.threads is None:
            return {"CUDA_VISIBLE_DEVICES": ",".join(devices)}
        return {"OMP_NUM_THREADS": str(self.threads)}


@checked("hydra.launcher")
def find_slots(slots: Count | None, num_gpus: int, wanted: int) -> Slots:
    """Return one slot a GPU, or, where there is none, as many CPU slots as there are cores or
    `wanted` processes.

    `slots` says otherwise: that many GPUs, the first ones, or CPU slots. Cores are divided among
    CPU slots. Raises UserError where there are fewer GPUs.
    """
    if num_gpus:
        # Jobs get the names that the variable has, be they numbers or UUIDs: theirs replaces it.
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(i) for i in range(num_gpus)]
        if slots is not None and slots > len(names):
            raise UserError(
                f"hydra.launcher.slots={slots}: there are {len(names)} GPUs; CPU slots need none "
                "visible"
            )
        return Slots(tuple(names[:slots]), None)
    cores = _num_cores()
    count = slots or min(cores, wanted)
    cpu_names = tuple(f"cpu{i}" for i in range(count))
    # PyTorch would take all cores for each job, and they would wait for one another.
    return Slots(cpu_names, threads=max(1, cores // count))


def _num_cores() -> int:
    """Count the cores that this process may use, where the system tells, or else all of them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Pool:
    """Run jobs as slots become free, each on as many as it has processes.

    Jobs are runs of `script` in the working directory `directory`. `is_fail_fast` stops everything
    when a job fails; otherwise the others go on. A job that does not end when asked is killed after
    `grace` seconds. On SIGINT or SIGTERM all jobs are asked to end, which lets them save their
    state, and KeyboardInterrupt is raised; a second signal kills them.
    """

    def __init__(
        self,
        slots: Slots,
        *,
        is_fail_fast: bool,
        grace: float,
        refresh: float,
        group: str,
        script: Path = TRAIN,
        directory: Path | None = None,
    ) -> None:
        self.slots = slots
        self.is_fail_fast = is_fail_fast
        self.grace = grace
        self.refresh = refresh
        self.group = group
        self.script = script
        self.directory = directory
        self.free = list(slots.names)
        self.running: dict[int, tuple[Job, Ranks]] = {}
        self.is_stopping = False
        self.signals: list[int] = []
        self.num_told = 0

    def run(self, jobs: Sequence[Job]) -> None:
        """Run all waiting jobs; their states tell how each ended. Raises UserError for one that can
        never fit.
        """
        num_slots = len(self.slots.names)
        for job in jobs:
            if job.num_processes > num_slots:
                raise UserError(
                    f"job {job.number} needs trainer.devices={job.num_processes}, but there are "
                    f"{num_slots} slots; lower it or raise hydra.launcher.slots"
                )
        table = LiveTable(jobs, self.refresh)
        # The handlers that stood before are put back at the end: a sweeper may run several batches.
        before = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, self._interrupt)
        try:
            while self._advance(jobs):
                table.show()
                time.sleep(POLL_SECONDS)
                self._tell_signals(table)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            table.show(is_last=True)
        if self.signals:
            raise KeyboardInterrupt

    def _tell_signals(self, table: LiveTable) -> None:
        """Say once of each of the first two signals what it does; printing within their handler is
        not safe.
        """
        while self.num_told < min(len(self.signals), len(NOTICES)):
            is_interrupt = self.signals[self.num_told] == signal.SIGINT
            name = "Ctrl-C" if is_interrupt else "SIGTERM"
            notice = NOTICES[self.num_told].format(name)
            table.start_below(notice)
            self.num_told += 1

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """Ask all jobs to end at the first signal, and kill them at the second."""
        self.signals.append(number)
        self._stop_all(is_kill=len(self.signals) > 1)

    def _stop_all(self, is_kill: bool = False) -> None:
        """End the running jobs, and start no others."""
        self.is_stopping = True
        for _, ranks in self.running.values():
            if is_kill:
                ranks.kill()
            else:
                ranks.stop()

    def _advance(self, jobs: Sequence[Job]) -> bool:
        """Start what fits, collect what has ended, and tell whether anything is left to do."""
        for job in jobs:
            is_next = job.state == "waiting" and not self.is_stopping
            if is_next and job.num_processes <= len(self.free):
                self._start(job)
        for job, ranks in list(self.running.values()):
            if ranks.poll():
                self._collect(job, ranks)
        if self.running:
            return True
        return not self.is_stopping and any(job.state == "waiting" for job in jobs)

    def _start(self, job: Job) -> None:
        """Start a job on free slots; one that still runs from an earlier start has failed."""
        job.devices = tuple(self.free[: job.num_processes])
        job.state = "running"
        job.problem = ""
        job.folder.mkdir(parents=True, exist_ok=True)
        variables = environment(self.group) | self.slots.variables(job.devices)
        line = command(job.arguments(self.slots.threads), self.script)
        try:
            ranks = Ranks(
                line,
                job.num_processes,
                job.folder / LOG,
                variables,
                self.grace,
                self.directory,
            )
        except StillRunning as error:
            job.state = "failed"
            job.problem = str(error)
            if self.is_fail_fast:
                self._stop_all()
            return
        del self.free[: job.num_processes]
        self.running[job.number] = job, ranks
        # A signal that came while they started has missed them.
        if self.is_stopping and len(self.signals) > 1:
            ranks.kill()
        elif self.is_stopping:
            ranks.stop()
        # Not before the log is locked: another process may own the folder.
        job.write()

    def _collect(self, job: Job, ranks: Ranks) -> None:
        """Take back the slots of a job that has ended, and note how it ended."""
        del self.running[job.number]
        self.free += job.devices
        job.seconds += ranks.seconds
        if not ranks.problem:
            job.state = "finished"
        else:
            job.state = "stopped" if self.is_stopping else "failed"
            job.problem = ranks.problem
        job.write()
        if job.state == "failed" and self.is_fail_fast:
            self._stop_all()
