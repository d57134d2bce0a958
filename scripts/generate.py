"""Draw prompts with a base model and a LoRA side by side: the door to `flowrl/cli/generate.py`."""

from flowrl.launch.program import run_program

import sys

from flowrl.cli.generate import main

if __name__ == "__main__":
    sys.exit(run_program(main, computes=True))
