"""The door of train.py and the scripts, which import it before anything heavy: an interrupt during
the seconds of their other imports ends the process without a traceback.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from flowrl.launch.interrupts import INTERRUPTED
from flowrl.launch.load import give_way_when_busy


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(INTERRUPTED)


busy_line = ""
"""What a program that computes says of a busy machine."""
# Where PyTorch is there already, as in tests, the process is not one that is only starting.
if "torch" not in sys.modules:
    # An interrupt that is ignored, as in the background of a shell, stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
    busy_line = give_way_when_busy()


def run_program(
    main: Callable[[], Any],
    log: Path | None = None,
    *,
    takes_overrides: bool = False,
    computes: bool = False,
) -> int:
    """Call `main` as `flowrl.launch.errors.one_line_errors` does, and return its exit status; from
    here on an interrupt raises KeyboardInterrupt.

    With `takes_overrides` the command line is Hydra's, and slips in it are answered before `main`.
    With `computes` the user is told where threads give way on a busy machine.
    """
    from flowrl.launch.errors import one_line_errors

    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if takes_overrides:
        from flowrl.launch.words import check_words, flags_first

        if status := one_line_errors(lambda: check_words(sys.argv[1:]), log):
            return status
        sys.argv[1:] = flags_first(sys.argv[1:])
    if computes and busy_line:
        print(busy_line, file=sys.stderr)
    return one_line_errors(main, log)
