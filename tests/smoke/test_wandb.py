"""W&B without a network: what is written is read back from its own files."""

import json

import offline
from runs import ROOT, train


def test_a_resumed_run_is_one_wandb_run(tmp_path):
    """Two segments with one id, each closed; iterations go on, and every picture is there once.

    Mutation: draw a new id at every start, number iterations from the resumption, or leave the run
    open.
    """
    run = tmp_path / "run"
    settings = (
        "debug=smoke",
        "num_iterations=1",
        "steps=all_but_last",
        "logger=wandb",
        "num_threads=1",
    )
    assert train(*settings, f"run_dir={run}", cwd=tmp_path).returncode == 0
    own = (run / "wandb_id").read_text()
    result = train(f"resume={run}", "num_iterations=2", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    first, second = offline.segments(run)
    for segment in (first, second):
        (start,) = offline.of_kind(segment, "run")[:1]
        assert (start.run_id, start.display_name) == (own, "shapes-cps-dppo-0")
        assert [end.exit_code for end in offline.of_kind(segment, "exit")] == [0]
        assert not offline.of_kind(segment, "alert")
    iterations = [
        [json.loads(value) for value in offline.history(part, "iteration")]
        for part in (first, second)
    ]
    assert iterations[0][0] == 0 and set(iterations[0]) == {0, 1} and set(iterations[1]) == {2}
    assert offline.images(run) == 3


def test_a_failed_gate_is_an_alert(tmp_path, monkeypatch):
    """Mutation: raise it where Lightning calls no hook, or leave W&B's run open."""
    run = tmp_path / "run"
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    fault = "+callbacks.impossible={_target_: faults.Impossible}"
    result = train(
        "debug=smoke", fault, "logger=wandb", "num_threads=1", f"run_dir={run}", cwd=tmp_path
    )
    assert result.returncode == 1
    (segment,) = offline.segments(run)
    (alert,) = offline.of_kind(segment, "alert")
    assert (alert.title, alert.level) == (
        "GateFailed",
        "ERROR",
    ) and "gate_tolerance=-1" in alert.text
    assert len(offline.of_kind(segment, "exit")) == 1
