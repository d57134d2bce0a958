import threading

import pytest

from flowrl.parallel import background


def test_a_future_is_cancelled_before_its_work_or_not_at_all(monkeypatch):
    """Mutation: work all the same, and fail in the thread at setting the result."""
    held, done = [], []
    monkeypatch.setattr(background.Thread, "start", lambda thread: held.append(thread))
    early = background.start(lambda: done.append(1), "early")
    assert early.cancel()
    held[0].run()
    assert done == []
    monkeypatch.undo()
    begun, release = threading.Event(), threading.Event()
    late = background.start(lambda: begun.set() or release.wait(5), "late")
    assert begun.wait(5) and not late.cancel()
    release.set()
    assert late.result(5)


def test_a_process_is_left_only_where_work_that_was_given_up_goes_on(monkeypatch):
    """Mutation: leave whenever something was given up, or with another status."""

    def left(status):
        raise SystemExit(status)

    monkeypatch.setattr(background.os, "_exit", left)
    monkeypatch.setattr(background, "_lost", [])
    release = threading.Event()
    slow = background.start(lambda: release.wait(5), "slow")
    background.leave(3)
    background.give_up(slow)
    with pytest.raises(SystemExit) as end:
        background.leave(3)
    assert end.value.code == 3
    release.set()
    slow.result(5)
    background.leave(3)
