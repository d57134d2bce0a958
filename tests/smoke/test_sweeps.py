"""A real sweep on two processes a job."""

import csv
import json

import pytest
from runs import train

JOBS = ("debug=smoke", "num_iterations=1", "viewing.every=0", "num_threads=1", "steps.high=4,6")
TWO = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")


@pytest.mark.slow
def test_a_sweep_of_jobs_on_two_processes(tmp_path):
    """The good job runs once, as two ranks that start no sweep of their own; the bad one fails alone, in one line.

    Mutation: run jobs inside the sweep's process, where Lightning starts the second rank with the sweep's arguments.
    """
    result = train("-m", *JOBS, *TWO, "hydra.launcher.slots=2", "hydra.sweep.dir=sweep", cwd=tmp_path)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 1
    assert len(errors) == 1 and "job 1 failed rank" in errors[0] and "-m resume=" in errors[0], result.stderr
    sweep = tmp_path / "sweep"
    assert {path.name for path in tmp_path.iterdir()} == {"sweep"}
    assert {path.name for path in sweep.iterdir()} == {"0", "1", "sweep.json", "multirun.yaml"}
    good, bad = (json.loads((sweep / name / "job.json").read_text()) for name in "01")
    assert (good["state"], bad["state"]) == ("finished", "failed")
    assert json.loads((sweep / "0" / "summary.json").read_text())["status"] == "finished"
    assert len(list(csv.DictReader((sweep / "0" / "metrics.csv").read_text().splitlines()))) == 1
    assert (sweep / "0" / "job.log").read_text().count("batch plan:") == 1
    assert "2 x 2 of 2 samples" in (sweep / "0" / "job.log").read_text()
    assert "zero-variance" in (sweep / "1" / "job.log").read_text()
