"""A run that is killed and resumed gives the same numbers, bitwise, as one that was never
stopped.
"""

import csv
import json
import os
import shutil
import signal
import time

import pytest
import torch
from runs import SHORT, start, train
from safetensors.torch import load_file

from flowrl.report.compare import conditions
from flowrl.report.runs import find
from flowrl.report.tables import run_table
from flowrl.runs import checkpoint

TIMES = (
    "perf/images_per_second",
    "perf/rollout_seconds",
    "perf/reward_seconds",
    "perf/update_seconds",
)


def rows(run):
    table = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    return [{name: value for name, value in row.items() if name not in TIMES} for row in table]


def test_resume_after_sigkill_is_bitwise(finished_run, tmp_path):
    """Killed in the middle of an iteration, with a half-written checkpoint left behind.

    Mutation: forget the optimizer's state, the EMA or the iteration counter in the checkpoint.
    """
    run = tmp_path / "killed"
    process = start(*SHORT, f"run_dir={run}", cwd=tmp_path)
    deadline = time.time() + 200
    while not (run / "checkpoints" / "000002" / "state.json").exists():
        assert process.poll() is None and time.time() < deadline, process.stderr.read()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    newest = max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
    if newest == 4:  # the machine outran the kill: step back to where it should have hit
        shutil.rmtree(run / "checkpoints" / "000004")
    (run / "checkpoints" / "000009.partial").mkdir()
    (run / "checkpoints" / "000009.partial" / "state.json").write_text("{}")

    result = train(f"resume={run}", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "resuming after iteration" in result.stdout
    assert rows(run) == rows(finished_run)
    for name in ("lora", "ema", "optimizer"):
        ours, theirs = (
            load_file(place / "checkpoints" / "000004" / f"{name}.safetensors")
            for place in (run, finished_run)
        )
        assert ours.keys() == theirs.keys() and all(
            torch.equal(ours[key], theirs[key]) for key in ours
        )


def test_interrupt_says_how_to_go_on(tmp_path):
    """The running iteration is finished and saved. Meanwhile no other process writes to the folder.

    Mutation: report an interrupted run as finished, exit with status 0, stop without a checkpoint,
    or share the folder.
    """
    run = tmp_path / "interrupted"
    process = start(
        *SHORT, "num_iterations=400", "checkpoint.every=1000", f"run_dir={run}", cwd=tmp_path
    )
    deadline = time.time() + 200
    while not (run / "metrics.csv").exists():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
    other = train(*SHORT, f"run_dir={run}", cwd=tmp_path)
    assert other.returncode == 1 and "written to by another process" in other.stderr
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 130 and "stopping after this iteration" in err
    assert (
        len(list((run / "checkpoints").glob("*/state.json"))) == 1
        and "the newest checkpoint is after" in out
    )
    assert f"train.py resume={run}" in out.partition("Continue with: ")[2]
    assert "Traceback" not in err


def test_resume_through_latest_follows_overrides(tmp_path):
    """`resume=outputs/latest` continues the run behind the link; `num_iterations` and `loss.delta`
    reach every use.

    So does a key that the run's version did not have. Mutation: resume from the resolved
    configuration, link `latest` to itself, or know the run's own keys only.
    """
    assert train("debug=smoke", "num_iterations=1", "viewing.every=0", cwd=tmp_path).returncode == 0
    run = (tmp_path / "outputs" / "latest").resolve()
    text = (run / "source.yaml").read_text()
    (run / "source.yaml").write_text(text.replace("max_missing: 0.2\n", ""))
    overrides = ("resume=outputs/latest", "num_iterations=2", "loss.delta=0.5")
    refused = train(*overrides, cwd=tmp_path)
    assert (
        refused.returncode == 1
        and "max_missing" in refused.stderr
        and len(refused.stderr.splitlines()) == 1
    )
    result = train(*overrides, "++max_missing=0.1", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "max_missing: 0.1" in (run / "config.yaml").read_text()
    assert "num_iterations 1 -> 2" in result.stdout
    assert (tmp_path / "outputs" / "latest").resolve() == run
    assert [row["iteration"] for row in rows(run)] == ["1", "2"]
    assert (run / "config.yaml").read_text().count(
        "delta: 0.5"
    ) == 2  # the loss, and the loss inside the algorithm
    again = train(f"run_dir={run}", "debug=smoke", cwd=tmp_path)
    assert again.returncode == 1 and "holds a run already" in again.stderr


def test_a_last_evaluation_that_failed_is_made_up_for(tmp_path):
    """A checkpoint without it, as a scorer that dies in it leaves one, and without the pictures
    from before.

    Mutation: call the run finished without evaluating it, or evaluate the trained policy as the one
    before.
    """
    assert train("debug=smoke", "num_iterations=2", "run_dir=run", cwd=tmp_path).returncode == 0
    run, whole = tmp_path / "run", json.loads((tmp_path / "run" / "summary.json").read_text())
    path = run / "checkpoints" / "000002" / checkpoint.STATE
    state = json.loads(path.read_text())
    del state["record"]["evaluations"]["after"]
    path.write_text(json.dumps(state))
    (path.parent / checkpoint.SUMS).unlink()  # as in a checkpoint of an earlier version
    (run / "images" / "before.safetensors").unlink()
    result = train("resume=run", cwd=tmp_path)
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert "before.safetensors is gone" in result.stdout
    again = json.loads((run / "summary.json").read_text())
    assert again["eval"] == whole["eval"] and again["device"] == whole["device"]
    assert [row["iteration"] for row in rows(run)] == ["1", "2"] and rows(run)[1][
        "eval/held_in/reward"
    ]
    assert not (run / "images" / "before.safetensors").exists()


def test_a_finished_run_takes_no_other_values(finished_run, tmp_path):
    """Refused in one line, with nothing written; with an iteration more it goes on, and the record
    and the report say what was changed.

    Mutation: write the configuration before looking for iterations to do.
    """
    run = tmp_path / "copy"
    shutil.copytree(finished_run, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    refused = train(f"resume={run}", "seed=5", cwd=tmp_path)
    (line,) = refused.stderr.splitlines()
    assert refused.returncode == 1 and "seed 0 -> 5" not in refused.stdout
    assert f"{run} is finished after 4 iterations; raise num_iterations to go on" in line
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert after == before
    result = train(f"resume={run}", "seed=5", "num_iterations=5", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "seed 0 -> 5: from here on the numbers are not those" in result.stdout
    (changed,) = find([run])
    assert sorted(map(str, changed.changes)) == ["num_iterations 4 -> 5", "seed 0 -> 5"]
    note = run_table([changed], conditions([changed]), []).note
    assert "copy: seed 0 -> 5 after iteration 4" in note


def test_a_resumed_run_is_the_run_it_was(tmp_path):
    """Its prompts, its numbers and its newest whole checkpoint; without a checkpoint `latest` stays
    where it is.

    Mutation: read the changed file without a word, take the damaged checkpoint, or move `latest` at
    the start.
    """
    (tmp_path / "p.txt").write_text("a red circle\na blue square\n")
    (tmp_path / "outputs" / "latest").mkdir(parents=True)
    overrides = (
        "data=text",
        "data.prompts.path=p.txt",
        *SHORT,
        "num_iterations=2",
        "run_dir=outputs/run",
    )
    result = train(*overrides, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "latest cannot be made a link to this run" in result.stdout
    run = tmp_path / "outputs" / "run"
    expected = rows(run)
    (run / "checkpoints" / "000002" / "state.json").write_text("{}")
    (run / "images" / "before.safetensors").write_bytes(b"")
    (tmp_path / "p.txt").write_text("a red circle\na green square\n")
    refused = train("resume=outputs/run", cwd=tmp_path)
    (line,) = refused.stderr.splitlines()
    assert (
        refused.returncode == 1
        and "data.prompts (p.txt): its 2 prompts changed since the run began" in line
    )
    (tmp_path / "p.txt").write_text("a red circle\r\na blue square\r\n")
    result = train("resume=outputs/run", "max_grad_norm=2", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "max_grad_norm 1.0 -> 2: from here on" in result.stdout
    assert "going on from" in result.stdout and "before.safetensors is damaged" in result.stdout
    assert [row["reward/mean"] for row in rows(run)] == [row["reward/mean"] for row in expected]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "000001",
        "000002",
        "000002.damaged",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        ("loss=nft", "sampler=ode"),
        ("loss=dgpo", "sampler=ode", "penalty=velocity"),
        ("loss=draft", "sampler=ode", "loss.num_noises=1", "reward=shapes_proxy"),
        ("loss.delta=auto", "loss.kl_budget=1e-7", "batch.inner_epochs=2"),
        ("loss.final_delta=1e-7",),
        ("tuning=full", "trainer=fsdp", "trainer.accelerator=cpu", "num_threads=1"),
        (
            "tuning=full",
            "trainer=fsdp",
            "trainer.accelerator=cpu",
            "num_threads=1",
            "loss=nft",
            "sampler=ode",
        ),
        (
            "trainer=fsdp",
            "trainer.accelerator=cpu",
            "num_threads=1",
            "loss=nft",
            "sampler=ode",
            "penalty=velocity",
        ),
    ],
)
def test_methods_with_a_state_of_their_own_resume_bitwise(method, tmp_path):
    """Diffusion-NFT's old weights, a threshold that holds a budget, one that follows the run,
    divided weights.

    Mutation: leave the old weights or the threshold out of the checkpoint, count a schedule from
    the resumption, or save or export the first process's parts for the whole.
    """
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert (
        train(*SHORT, *method, "checkpoint.keep=9", f"run_dir={whole}", cwd=tmp_path).returncode
        == 0
    )
    shutil.copytree(whole, part)
    for number in ("000003", "000004"):
        shutil.rmtree(part / "checkpoints" / number)
    result = train(f"resume={part}", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert rows(part) == rows(whole)
    folder = "transformer" if "tuning=full" in method else "lora"
    files = [
        *(whole / "checkpoints" / "000004").glob("*.safetensors"),
        *(whole / folder).glob("*.safetensors"),
    ]
    assert len(files) > 4
    for file in files:
        ours, theirs = load_file(part / file.relative_to(whole)), load_file(file)
        assert ours.keys() == theirs.keys() and all(
            torch.equal(ours[key], theirs[key]) for key in ours
        )
    if "tuning=full" in method:
        exported, averaged = (
            load_file(files[-1]),
            load_file(whole / "checkpoints" / "000004" / "ema.safetensors"),
        )
        assert all(torch.equal(exported[name], value) for name, value in averaged.items())


def test_sigterm_saves_and_resumes_to_the_same_numbers(finished_run, tmp_path):
    """As Slurm sends it before the time limit: the running iteration is finished and saved, no
    periodic checkpoint is.

    Mutation: end at once, or save without the iteration that was running.
    """
    run = tmp_path / "asked"
    process = start(*SHORT, "checkpoint.every=100", f"run_dir={run}", cwd=tmp_path)
    deadline = time.time() + 200
    while not (run / "images" / "before.safetensors").exists():
        assert process.poll() is None and time.time() < deadline, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 130 and "Traceback" not in err, err
    (saved,) = (int(path.name) for path in (run / "checkpoints").iterdir())
    assert saved < 4 and f"the newest checkpoint is after iteration {saved}" in out
    result = train(f"resume={run}", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert rows(run) == rows(finished_run)
    ours, theirs = (
        load_file(place / "checkpoints" / "000004" / "lora.safetensors")
        for place in (run, finished_run)
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
