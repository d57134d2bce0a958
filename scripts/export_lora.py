"""Convert a LoRA between diffusers, peft and ComfyUI: the door to `flowrl/cli/export.py`."""

from flowrl.launch.program import run_program

import sys

from flowrl.cli.export import main

if __name__ == "__main__":
    sys.exit(run_program(main))
