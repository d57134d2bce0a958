import threading

from flowrl import background


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
