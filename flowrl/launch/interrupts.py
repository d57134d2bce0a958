"""Interrupts that something swallows: Python in a finalizer, or a library while it is imported.

This module imports nothing of FlowRL's, and nothing heavy.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130
"""The exit status after an interrupt."""

AGAIN_AFTER = 0.05
"""Seconds after which an interrupt that fell into a finalizer is sent again."""

_noted: list[int] = []


@contextmanager
def noted_interrupts() -> Iterator[list[int]]:
    """Note each SIGINT in the list before it raises KeyboardInterrupt, where nobody else handles
    it, and send those again that Python cannot raise.

    An exception within a finalizer, such as `__del__` or a weak reference's callback, has nowhere
    to go: Python prints it and goes on (`sys.unraisablehook`).
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield []
        return
    _noted.clear()
    hook = sys.unraisablehook

    def again(unraisable: sys.UnraisableHookArgs) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            hook(unraisable)
            return
        # Not from here, since this too is within the finalizer; and to the main thread, so that it
        # wakes up.
        target = threading.main_thread().ident
        timer = threading.Timer(AGAIN_AFTER, signal.pthread_kill, (target, signal.SIGINT))
        timer.daemon = True
        timer.start()

    signal.signal(signal.SIGINT, _note)
    sys.unraisablehook = again
    try:
        yield _noted
    finally:
        # Whoever took over meanwhile keeps it.
        if signal.getsignal(signal.SIGINT) is _note:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if sys.unraisablehook is again:
            sys.unraisablehook = hook


def _note(number: int, frame: FrameType | None) -> None:
    _noted.append(number)
    signal.default_int_handler(number, frame)


def heed_swallowed() -> None:
    """Raise KeyboardInterrupt if an interrupt was noted: the caller still runs, so that something
    has swallowed it.
    """
    if _noted:
        raise KeyboardInterrupt
