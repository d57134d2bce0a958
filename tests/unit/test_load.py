"""Threads give way on a busy machine, and nowhere else."""

import os

import pytest

from flowrl.launch.load import SAID, give_way_when_busy


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """An environment of its own, in which nobody has decided."""
    own = {name: value for name, value in os.environ.items() if name not in SAID}
    own.pop("OMP_NUM_THREADS", None)
    monkeypatch.setattr(os, "environ", own)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    return own


@pytest.mark.parametrize("load", [0.0, 4.0, 6.0])
def test_threads_give_way_on_a_busy_machine(load, environment, monkeypatch, capsys):
    """Mutation: always, which costs a third of the speed, or in silence."""
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    give_way_when_busy()
    assert (environment.get("OMP_WAIT_POLICY") == "PASSIVE") is (load > 5)
    assert ("load 6.0, 4 cores" in capsys.readouterr().err) is (load > 5)


@pytest.mark.parametrize("said", ["OMP_WAIT_POLICY=ACTIVE", "OMP_NUM_THREADS=1"])
def test_the_users_choice_stays(said, environment, monkeypatch):
    """Mutation: overwrite it, or touch a process of one thread, which waits for none."""
    monkeypatch.setattr(os, "getloadavg", lambda: (100.0, 0.0, 0.0))
    name, value = said.split("=")
    environment[name] = value
    give_way_when_busy()
    assert environment.get("OMP_WAIT_POLICY") in (None, "ACTIVE")
