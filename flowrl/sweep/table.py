"""The live table of a sweep: one line a job, redrawn on a terminal; elsewhere a line whenever a
job's state changes.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence

from flowrl.sweep.job import Job


class LiveTable:
    """The table of some jobs, which is drawn at most every `refresh` seconds."""

    def __init__(self, jobs: Sequence[Job], refresh: float) -> None:
        self.jobs = jobs
        self.refresh = refresh
        self.next = 0.0
        self.num_lines = 0
        self.start = time.monotonic()
        self.shown: dict[int, str] = {job.number: job.state for job in jobs}

    def show(self, is_last: bool = False) -> None:
        """Draw what is new."""
        if not sys.stdout.isatty():
            self._log()
        elif is_last or time.monotonic() >= self.next:
            self._draw()
            self.next = time.monotonic() + self.refresh

    def start_below(self, text: str) -> None:
        """Print a line, below which the table is drawn anew at once."""
        print(f"\n{text}", flush=True)
        self.num_lines = 0
        self.next = 0.0

    def _log(self) -> None:
        for job in self.jobs:
            if job.state != self.shown[job.number]:
                self.shown[job.number] = job.state
                print(line(job), flush=True)

    def _draw(self) -> None:
        # A line that the terminal breaks in two would make the next table begin too low.
        width = shutil.get_terminal_size().columns - 1
        lines = [line(job) for job in self.jobs]
        counts = Counter(job.state for job in self.jobs)
        summary = ", ".join(f"{count} {state}" for state, count in counts.items())
        seconds = time.monotonic() - self.start
        lines.append(f"{summary}; {seconds:.0f} s")
        # Up to the first line of the table that stands there, each of whose lines is cleared.
        up = f"\033[{self.num_lines}F" if self.num_lines else ""
        table = "\n".join(f"\033[K{text[:width]}" for text in lines)
        print(up + table, flush=True)
        self.num_lines = len(lines)


def line(job: Job) -> str:
    """Write the number, state, progress, last reward, devices, seconds and overrides of a job."""
    done, reward = job.progress()
    where = ",".join(job.devices)
    progress = f"{done}/{job.num_iterations}"
    overrides = " ".join(job.overrides)
    text = f"  {job.number:>3} {job.state:<9} {progress:>9} {reward:>6}  {where:<10} {overrides}"
    if job.problem:
        text += f"  ({job.problem})"
    return text
