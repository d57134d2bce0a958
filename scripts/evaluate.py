"""Evaluate base models, runs and LoRA files on one page: the door to `flowrl/cli/evaluate.py`."""

from flowrl.launch.program import run_program  # noqa: F401

import sys

from flowrl.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
