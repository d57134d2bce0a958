"""Work in a daemon thread: it runs beside the caller, and the interpreter's end does not wait for it.

`concurrent.futures` joins its threads at exit, so that a scorer that hangs would keep Ctrl-C from ending a run.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import Any, TypeVar

Result = TypeVar("Result")

GRACE = 5.0
"""Seconds after the main thread's end until a process that a lost thread keeps alive is ended."""


def start(work: Callable[[], Result], name: str) -> Future[Result]:
    """Run `work` in a thread called `name`; its result, or what it raised, waits in the future.

    A future that is cancelled before the thread has begun is not worked on; after that it cannot be cancelled.
    """
    future: Future[Result] = Future()

    def run() -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = work()
        except BaseException as error:  # raised where the result is asked for
            future.set_exception(error)
        else:
            future.set_result(result)

    Thread(target=run, name=name, daemon=True).start()
    return future


def end_regardless(lost: Future[Any], status: int) -> None:
    """See to it that the process ends with its main thread, even where the thread behind `lost` would keep it alive.

    A daemon thread does not, but others that it has started, such as those of a pool, are waited for at exit. A process
    that is still there `GRACE` seconds after its main thread's end exits with `status`.
    """

    def watch() -> None:
        threading.main_thread().join()
        time.sleep(GRACE)
        if not lost.done():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    Thread(target=watch, name="watch", daemon=True).start()
