"""Work in a daemon thread: it runs beside the caller, and the interpreter's end does not wait for
it.

`concurrent.futures` joins its threads at exit, so that a scorer that hangs would keep Ctrl-C from
ending a run.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import Any, TypeVar

Result = TypeVar("Result")

_lost: list[Future[Any]] = []
"""Work that was given up, and may still go on."""


def start(work: Callable[[], Result], name: str) -> Future[Result]:
    """Run `work` in a thread called `name`; its result, or what it raised, waits in the future.

    A future that is cancelled before the thread has begun is not worked on; after that it cannot be
    cancelled.
    """
    future: Future[Result] = Future()
    Thread(target=run, args=(work, future), name=name, daemon=True).start()
    return future


def run(work: Callable[[], Result], future: Future[Result]) -> None:
    """Run `work` here, unless `future` is cancelled; its result, or what it raised, goes there."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = work()
    except BaseException as error:  # raised where the result is asked for
        future.set_exception(error)
    else:
        future.set_result(result)


def give_up(future: Future[Any]) -> None:
    """Note that nobody waits for `future` any more, so that `leave` does not either."""
    _lost.append(future)


def leave(status: int) -> None:
    """End the process with `status`, at once, where work that was given up still goes on; else do
    nothing.

    A daemon thread does not hold up the interpreter's end, but others that it has started, such as
    those of a pool, do.
    """
    if all(future.done() for future in _lost):
        return
    # `os._exit` runs no exit handlers and empties no buffers.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
