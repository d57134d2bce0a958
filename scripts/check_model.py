"""Check that a pipeline of diffusers does the same under FlowRL as by itself: the door to
`flowrl/cli/parity.py`.
"""

from flowrl.launch.program import run_program

import sys

from flowrl.cli.parity import main

if __name__ == "__main__":
    sys.exit(run_program(main))
