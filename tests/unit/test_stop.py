"""What a run says, and when it stops, after signals; the handler is called as Python would call
it.
"""

import signal
from types import SimpleNamespace

import pytest

from flowrl.callbacks import stop as module
from flowrl.callbacks.stop import Stop


@pytest.fixture
def stop(monkeypatch):
    """A callback that waits for a scorer; its time is `stop.now`, and no handler of this process is
    changed.
    """
    callback = Stop()
    callback.reward = SimpleNamespace(waits_for=lambda: "HPSv3, asked 61 s ago", running=None)
    callback.now, callback.handlers = 100.0, {}
    monkeypatch.setattr(module.time, "monotonic", lambda: callback.now)
    monkeypatch.setattr(module.signal, "signal", callback.handlers.__setitem__)
    return callback


def test_the_first_interrupt_says_what_it_waits_for(stop, capfd):
    """And how to stop at once, which the second one does. Mutation: say nothing of the scorer."""
    stop._remember(signal.SIGINT, None)
    assert stop.has_signal
    assert capfd.readouterr().err == (
        "\nstopping after this iteration, with a checkpoint; waiting for HPSv3, asked 61 s ago; "
        "Ctrl-C again stops at once\n"
    )
    with pytest.raises(KeyboardInterrupt):
        stop.handlers[signal.SIGINT](signal.SIGINT, None)


def test_a_second_sigterm_stops_at_once_only_while_a_scorer_is_waited_for(stop, capfd):
    """Not the echo within a second, and never a run that is at work itself. Mutation: drop either
    condition.
    """
    stop._remember(signal.SIGTERM, None)
    assert "waiting for HPSv3" in capfd.readouterr().err
    stop.now += 0.5
    stop._remember(signal.SIGTERM, None)
    stop.now += 60
    reward, stop.reward = stop.reward, SimpleNamespace(waits_for=lambda: None, running=None)
    stop._remember(signal.SIGTERM, None)
    stop.reward = reward
    with pytest.raises(KeyboardInterrupt):
        stop._remember(signal.SIGTERM, None)
    assert capfd.readouterr().err == ""
