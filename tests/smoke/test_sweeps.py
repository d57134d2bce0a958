"""A real sweep on two processes a job."""

import csv
import json
import shutil
import time

import offline
import pytest
import yaml
from runs import ROOT, train

from flowrl.runs.command_line import override

JOBS = ("debug=smoke", "num_iterations=1", "viewing.every=0", "num_threads=1", "steps.high=4,6")
TWO = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")


def test_jobs_run_what_their_sweep_shows_and_are_runs_as_any(tmp_path):
    """With an experiment from a folder of the user's, in a folder whose name Hydra's grammar and
    shells do not take.

    Mutation: start the jobs without `--config-dir`, or hand on folders without quotes.
    """
    place = tmp_path / "my project (copy) é #1"
    (place / "DIR" / "experiment").mkdir(parents=True)
    (place / "DIR" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nnum_iterations: 1\n"
    )
    settings = (
        "--config-dir",
        "DIR",
        "debug=smoke",
        "experiment=mine",
        "viewing.every=0",
        "num_threads=1",
        "name=x",
    )
    result = train("-m", *settings, "seed=0,1", "hydra.sweep.dir=sweep", cwd=place)
    assert result.returncode == 0, result.stderr
    for seed in ("0", "1"):
        assert (
            json.loads((place / "sweep" / seed / "summary.json").read_text())["status"]
            == "finished"
        )
    job = place / "sweep" / "1"
    shown = train(
        "--cfg", "job", "--resolve", *settings, "seed=1", override("run_dir", str(job)), cwd=place
    ).stdout
    ran = yaml.safe_load((job / "config.yaml").read_text())
    assert ran.pop("tags") == [
        "sampler=cps",
        "loss=dppo",
        "model=shapes",
        "reward=shapes",
        "delta=2e-05",
    ]
    label, _, digest = ran.pop("condition").partition(" #")
    # The sweep varies its seed alone.
    assert (label, len(digest), ran.pop("sweep")) == ("x", 6, "sweep")
    assert ran.pop("choices")["experiment"] == "mine"
    labels = ("tags", "condition", "sweep", "choices")
    assert ran == {key: value for key, value in yaml.safe_load(shown).items() if key not in labels}
    resumed = train(override("resume", str(job)), "num_iterations=2", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert [
        row["iteration"] for row in csv.DictReader((job / "metrics.csv").read_text().splitlines())
    ] == ["1", "2"]


HOSTILE = {
    "a variable": lambda text, place: text.replace(
        "env_set: {}", f"env_set: {{PYTHONPATH: {place}}}"
    ),
    "a target": lambda text, place: text.replace("flowrl.losses.dppo.DPPO", "site.addsitedir"),
}


@pytest.mark.slow
def test_a_downloaded_sweep_that_would_run_code_is_refused_before_any_job_starts(tmp_path):
    """One job is left to start, and its composed file was changed; the same sweep goes on once it
    is put back.

    Mutation: start the jobs of a resumed sweep without checking what they start from.
    """
    words = ("debug=smoke", "num_iterations=1", "viewing.every=0", "num_threads=1", "seed=0,1")
    assert train("-m", *words, "hydra.sweep.dir=sweep", cwd=tmp_path).returncode == 0
    job = tmp_path / "sweep" / "1"
    text = (job / "job.yaml").read_text()
    shutil.rmtree(job)
    job.mkdir()
    for change in HOSTILE.values():
        changed = change(text, tmp_path / "trap")
        assert changed != text
        (job / "job.yaml").write_text(changed)
        result = train("-m", "resume=sweep", cwd=tmp_path)
        assert result.returncode == 1
        assert f"{job}" in result.stderr and "run code" in result.stderr, result.stderr
        assert {path.name for path in job.iterdir()} == {"job.yaml"}
    (job / "job.yaml").write_text(text)
    assert train("-m", "resume=sweep", cwd=tmp_path).returncode == 0
    assert json.loads((job / "summary.json").read_text())["status"] == "finished"


@pytest.mark.slow
def test_a_sweep_of_jobs_on_two_processes(tmp_path):
    """The good job runs once, as two ranks that start no sweep of their own; the bad one fails
    alone, in one line.

    Mutation: run jobs inside the sweep's process, where Lightning starts the second rank with the
    sweep's arguments.
    """
    result = train(
        "-m", *JOBS, *TWO, "hydra.launcher.slots=2", "hydra.sweep.dir=sweep", cwd=tmp_path
    )
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 1
    assert len(errors) == 1 and "job 1 failed rank" in errors[0] and "-m resume=" in errors[0], (
        result.stderr
    )
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


@pytest.mark.slow
def test_a_crash_and_a_killed_rank_leave_the_other_jobs_alone(tmp_path, monkeypatch):
    """Four jobs on two processes: one raises in a rank, one rank of another is killed. The second
    start runs those two.

    Folders and W&B runs are separate; each has a picture before training and one an iteration, over
    both starts. Mutation: let jobs share a W&B run, wait for the peers of a killed rank, or start
    failed jobs from nothing.
    """
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    fault = "+callbacks.fault={_target_: faults.Fault, crash: 1, kill: 2}"
    settings = (
        "debug=smoke",
        "num_iterations=3",
        "viewing.every=1",
        "logger=wandb",
        "num_threads=1",
        "seed=0,1,2,3",
    )
    command = ("-m", *settings, *TWO, fault, "hydra.launcher.slots=2", "hydra.sweep.dir=sweep")
    start = time.monotonic()
    result = train(*command, cwd=tmp_path, seconds=900)
    assert result.returncode == 1 and "2 of 4 jobs did not finish" in result.stderr, result.stderr
    jobs = [tmp_path / "sweep" / str(number) for number in range(4)]
    states = [json.loads((job / "job.json").read_text()) for job in jobs]
    assert [state["state"] for state in states] == ["finished", "failed", "failed", "finished"]
    assert "exit status 1" in states[1]["problem"] and "SIGKILL" in states[2]["problem"]
    assert max(state["seconds"] for state in states) < time.monotonic() - start < 900
    kept = {job: (job / "metrics.csv").stat().st_mtime for job in (jobs[0], jobs[3])}
    again = train(
        "-m",
        "resume=sweep",
        "trust_folder=true",
        "hydra.launcher.slots=2",
        cwd=tmp_path,
        seconds=900,
    )
    assert again.returncode == 0, again.stderr
    assert "2 of 4 jobs to run" in again.stdout and "all 4 jobs finished" in again.stdout
    assert kept == {job: (job / "metrics.csv").stat().st_mtime for job in kept}
    assert [len(offline.segments(job)) for job in jobs] == [1, 2, 2, 1]
    starts = [offline.of_kind(part, "run")[0] for job in jobs for part in offline.segments(job)]
    assert len({start.run_id for start in starts}) == 4
    assert {start.run_group for start in starts} == {"sweep"}
    assert not any(set("[]=,") & set(start.display_name) for start in starts)
    for job in jobs:
        assert json.loads((job / "summary.json").read_text())["status"] == "finished"
        assert [
            row["iteration"]
            for row in csv.DictReader((job / "metrics.csv").read_text().splitlines())
        ] == [
            "1",
            "2",
            "3",
        ]
        assert offline.images(job) == 4
