"""List the runs below a folder, the one that was last written to at the end.

    python scripts/list_runs.py
    python scripts/list_runs.py outputs/2026-01-01
    python scripts/list_runs.py outputs --json

A line each: what became of a run, iterations done of all, method, seed, the headline of the
evaluation before and after training on the first set of prompts, time, and folder. A run without a
summary is `running` while a process of this machine has its folder, and else `unfinished`: killed,
or run on another machine. Damaged runs are listed with the reason.
"""

from __future__ import annotations

from flowrl.launch.program import run_program

import shutil
import sys
from pathlib import Path

from flowrl.cli import arguments
from flowrl.errors import UserError
from flowrl.report.listing import as_json, as_lines, entry
from flowrl.report.runs import folders_below


def main() -> None:
    """Read all runs and print them."""
    args = arguments.runs().parse_args()
    if not args.folder.is_dir():
        raise UserError(f"{args.folder}: no such folder; give one that runs lie in or below")
    entries = [entry(folder) for folder in folders_below(args.folder)]
    entries.sort(key=lambda entry: (entry.written, entry.folder))
    if args.json:
        print(as_json(entries))
        return
    # Where nobody reads along, a run stays one line.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print("\n".join(as_lines(entries, Path(), width)))


if __name__ == "__main__":
    raise SystemExit(run_program(main))
