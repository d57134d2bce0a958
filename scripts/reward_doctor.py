"""Examine a reward on images rendered on the spot: the door to `flowrl/cli/doctor.py`."""

from flowrl.launch.program import run_program  # noqa: F401

import sys

from flowrl.cli.doctor import main

if __name__ == "__main__":
    sys.exit(main())
