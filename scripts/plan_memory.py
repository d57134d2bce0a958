"""Estimate a run's GPU memory per phase: the door to `flowrl/cli/plan.py`."""

from flowrl.launch.program import run_program

import sys

from flowrl.cli.plan import main

if __name__ == "__main__":
    sys.exit(run_program(main))
