"""List the runs below a folder: the door to `flowrl/cli/runs.py`."""

from flowrl.launch.program import run_program

import sys

from flowrl.cli.runs import main

if __name__ == "__main__":
    sys.exit(run_program(main))
