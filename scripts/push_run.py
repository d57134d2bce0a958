"""Share a finished run on the hub: the door to `flowrl/cli/push.py`."""

from flowrl.launch.program import run_program

import sys

from flowrl.cli.push import main

if __name__ == "__main__":
    sys.exit(run_program(main))
