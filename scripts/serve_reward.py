"""Serve a reward over HTTP: the door to `flowrl/cli/serve.py`."""

from flowrl.launch.program import run_program

import sys

from flowrl.cli.serve import main

if __name__ == "__main__":
    sys.exit(run_program(main, computes=True))
