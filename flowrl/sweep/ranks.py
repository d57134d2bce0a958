"""The processes of one job are k ranks in one process group, which end together.

Their log carries the lock, since children inherit an open file and its lock with it; a lock of
filelock's would end with the process that took it, while ranks may outlive that.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from flowrl.sweep.job import LOG, Job, JobsFailed, command, environment, objective

POLL_SECONDS = 0.2
FAILURE_SECONDS = 10.0
"""The time that the ranks of a job have to end after one of them failed; a rank that waits for it
in a collective never would.
"""
GRACE_SECONDS = 300.0
"""The time that a job has to finish its iteration and save its state when another launcher stops
it.
"""


class StillRunning(RuntimeError):
    """Another process writes to the log: the job is alive from an earlier start."""


class Ranks:
    """Start `command` `count` times as the ranks of one job, which find each other by Lightning's
    variables.

    All share a process group of their own, so a Ctrl-C at the terminal does not reach them, a log,
    and the working directory `directory`, by default this process's. When a rank fails, the rest
    get SIGTERM, and SIGKILL after FAILURE_SECONDS; likewise when one has ended well and others have
    not within `grace` seconds. Where `stop` asks them to end, they have `grace` seconds to save
    their state.
    """

    def __init__(
        self,
        command: Sequence[str],
        count: int,
        log: Path,
        environment: Mapping[str, str],
        grace: float,
        directory: Path | None = None,
    ) -> None:
        self.grace = grace
        self.deadline: float | None = None
        self.problem = ""
        self.is_ending = False
        self.start = time.monotonic()
        self.ranks: list[subprocess.Popen[bytes]] = []
        with log.open("ab") as file:
            try:
                # The ranks inherit the lock with the file, so it is held as long as any of them
                # lives.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise StillRunning(
                    f"{log.parent}: a process of an earlier start still runs there"
                ) from error
            meeting: dict[str, str] = {}
            if count > 1:
                meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
            for rank in range(count):
                # A rank that is alone needs no variables, and with them would wait for others.
                place: dict[str, str] = {}
                if meeting:
                    place = {**meeting, "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
                # 0 makes a group of the first rank's number, which the others join.
                group = self.ranks[0].pid if self.ranks else 0
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env={**environment, **place},
                    cwd=directory,
                    process_group=group,
                )
                self.ranks.append(process)

    @property
    def seconds(self) -> float:
        """Return the wall time since the start."""
        return time.monotonic() - self.start

    def poll(self) -> bool:
        """Tell whether all ranks have ended, and end those that outlive a failure. `problem` tells
        what went wrong, if anything did.
        """
        codes = [rank.poll() for rank in self.ranks]
        self._note_failure(codes)
        if None not in codes:
            self._signal(signal.SIGKILL)  # what the ranks themselves have left behind
            return True
        is_first_to_end = self.deadline is None and codes != [None] * len(codes)
        if is_first_to_end:
            # The first rank, which closes files and trackers, may be the last to end.
            self.deadline = time.monotonic() + self.grace
        if self.deadline is not None and time.monotonic() > self.deadline:
            self._end_late(codes)
        return False

    def _note_failure(self, codes: Sequence[int | None]) -> None:
        """Keep how the first rank failed, and end the others."""
        for number, code in enumerate(codes):
            # Later failures follow from the first: they are those of ranks that were ended.
            if code and not self.problem:
                ending = _ending(code)
                self.problem = ending if len(codes) == 1 else f"rank {number}: {ending}"
                self._end(FAILURE_SECONDS)

    def _end_late(self, codes: Sequence[int | None]) -> None:
        """Ask ranks whose time is over to end, and kill them when they were asked before."""
        if self.is_ending:
            self._signal(signal.SIGKILL)
        else:
            self.problem = f"rank {codes.index(None)} went on after another had ended"
            self._end(FAILURE_SECONDS)

    def stop(self) -> None:
        """Ask all ranks to save their state and end; `poll` kills those that do not."""
        self._end(self.grace)

    def _end(self, seconds: float) -> None:
        """Ask all ranks to end within `seconds`."""
        self.is_ending = True
        self.deadline = time.monotonic() + seconds
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End all ranks at once."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        """Send a signal to the ranks and to what they have started; none may be left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.ranks[0].pid, number)


def _ending(code: int) -> str:
    """Put the exit code of a process that failed into words."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def _free_port() -> int:
    """Return a port that is free now, for the ranks to meet at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_to_end(job: Job, score: str, script: Path, directory: Path) -> float | None:
    """Run one job on this process's devices, unless it has finished, and return its objective.

    The job is a call of `script` in the working directory `directory`. This is for launchers that
    call a function for each job: it is still processes of its own. Raises JobsFailed. An interrupt
    is passed on to it; so is SIGTERM, which lets it save its state.
    """
    if not job.is_finished:
        job.state = "running"
        job.folder.mkdir(parents=True, exist_ok=True)
        job.prepare()
        line = command(job.arguments(None), script)
        variables = environment(job.folder.parent.name)
        ranks = Ranks(
            line,
            job.num_processes,
            job.folder / LOG,
            variables,
            GRACE_SECONDS,
            directory,
        )
        before = signal.signal(signal.SIGTERM, lambda *_: ranks.stop())
        try:
            # Not before the log is locked: another process may own the folder.
            job.write()
            _wait(ranks)
        except BaseException:
            # Ctrl-C reaches this process alone, since the ranks have a group of their own.
            ranks.stop()
            _wait(ranks)
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
            job.seconds = ranks.seconds
            job.problem = ranks.problem
            job.state = "failed" if ranks.problem else "finished"
            job.write()
        if ranks.problem:
            overrides = " ".join(job.overrides)
            raise JobsFailed(f"{overrides}: {ranks.problem}; see {job.folder / LOG}")
    return objective(job.folder, score)


def _wait(ranks: Ranks) -> None:
    """Return when all ranks have ended, of themselves or by force."""
    while not ranks.poll():
        time.sleep(POLL_SECONDS)
