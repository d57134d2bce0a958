"""Compare runs on one offline page: the door to `flowrl/cli/report.py`."""

from flowrl.launch.program import run_program

import sys

from flowrl.cli.report import main

if __name__ == "__main__":
    sys.exit(run_program(main))
