"""Threads give way on a busy machine, and nowhere else."""

import os
import subprocess
import sys

import pytest
from runs import ROOT

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
def test_threads_give_way_on_a_busy_machine(load, environment, monkeypatch):
    """Mutation: always, which costs a third of the speed, or in silence."""
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    line = give_way_when_busy()
    assert (environment.get("OMP_WAIT_POLICY") == "PASSIVE") is (load > 5)
    assert ("load 6.0, 4 cores" in line) is (load > 5)


@pytest.mark.parametrize("said", ["OMP_WAIT_POLICY=ACTIVE", "OMP_NUM_THREADS=1"])
def test_the_users_choice_stays(said, environment, monkeypatch):
    """Mutation: overwrite it, or touch a process of one thread, which waits for none."""
    monkeypatch.setattr(os, "getloadavg", lambda: (100.0, 0.0, 0.0))
    name, value = said.split("=")
    environment[name] = value
    give_way_when_busy()
    assert environment.get("OMP_WAIT_POLICY") in (None, "ACTIVE")


START = """
import atexit, os, runpy, sys
os.getloadavg = lambda: (99.0, 0.0, 0.0)
os.cpu_count = lambda: 2
atexit.register(lambda: print(os.environ.get("OMP_WAIT_POLICY")))
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Starts a program on a machine that is busy."""


@pytest.mark.parametrize(
    ("words", "is_told"),
    [
        ("train.py sampler=cpss", True),
        ("scripts/evaluate.py nothing", True),
        ("scripts/report.py x", False),
    ],
)
def test_every_program_gives_way_and_those_that_compute_say_so(words, is_told, tmp_path):
    """An evaluation that spun beside other work took four times as long. Mutation: decide it for
    train.py alone, or once PyTorch is there.
    """
    program, word = words.split()
    own = {name: value for name, value in os.environ.items() if name not in SAID}
    done = subprocess.run(
        [sys.executable, "-c", START, str(ROOT / program), word],
        cwd=tmp_path,
        env=own | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert "PASSIVE" in done.stdout, done.stderr
    assert ("busy machine (load 99.0, 2 cores)" in done.stderr) is is_told
