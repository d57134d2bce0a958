"""Runs whose scorer hangs: given up on two ranks, and told of and left at once on one."""

import signal
import subprocess
import time

import pytest
from runs import ROOT, SHORT, start


def hanging(rank, marker):
    values = (f"+reward.rank={rank}", "+reward.call=3", f"+reward.marker={marker}")
    return (
        "reward._target_=faults.Hanging",
        "~reward.score",
        *values,
        "num_threads=1",
        "evaluation.headline=reward",
    )


@pytest.fixture
def faults(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))


@pytest.mark.slow
def test_on_two_ranks_neither_the_hanging_one_stays_nor_the_other_waits(tmp_path, faults):
    """The second rank's scorer hangs in a thread that Python waits for at exit; both ranks end,
    with the reason.

    All of their output is read to its end, which a process that stays would keep open. Mutation: no
    scorer_timeout, one that each later call waits for again, or an exit that joins the thread.
    """
    ranks = ("trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "scorer_timeout=3")
    run = tmp_path / "run"
    process = start(*SHORT, *hanging(1, tmp_path / "hangs"), *ranks, f"run_dir={run}", cwd=tmp_path)
    while not (tmp_path / "hangs").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    begin = time.monotonic()
    _, err = process.communicate(timeout=100)
    assert time.monotonic() - begin < 60 and process.returncode == 1, err
    assert "Hanging gave no scores within scorer_timeout=3 s" in err and "Traceback" not in err
    assert f"train.py resume={run}" in err.partition("continue with: ")[2]


def test_a_run_that_waits_for_a_scorer_says_so_and_can_be_left(tmp_path, faults):
    """After SIGTERM the line names the scorer; a second one ends the run at once, though the scorer
    hangs on.

    Mutation: wait without a word, take the second SIGTERM for the first, or wait for the scorer's
    threads at exit.
    """
    settings = hanging(0, tmp_path / "hangs")
    process = start(
        *SHORT, *settings, "scorer_timeout=null", f"run_dir={tmp_path / 'run'}", cwd=tmp_path
    )
    while not (tmp_path / "hangs").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # as a launcher forwards what its group has had
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=3)
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and time.monotonic() - begin < 30
    (line,) = [line for line in err.splitlines() if line.startswith("stopping")]
    assert (
        "; waiting for Hanging, asked " in line
        and "SIGTERM again, or Ctrl-C twice, stops at once" in line
    )
