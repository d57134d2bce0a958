"""Run, collect and write up a study: the door to `flowrl/cli/study.py`."""

from flowrl.launch.program import run_program

import sys

from flowrl.cli.study import main

if __name__ == "__main__":
    sys.exit(run_program(main, computes=True))
