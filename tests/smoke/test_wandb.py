"""W&B without a network: what is written is read back from its own files."""

import json
import re
from collections import defaultdict

import offline
import pytest
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
        assert start.run_id == own
        assert re.fullmatch(
            r"shapes-cps-dppo debug=smoke num_iterations=1 steps=all_but_last #\w{6} seed=0",
            start.display_name,
        )
        assert offline.config(segment)["choices"]["steps"] == "all_but_last"
        assert [end.exit_code for end in offline.of_kind(segment, "exit")] == [0]
        assert not offline.of_kind(segment, "alert")
    iterations = [
        [json.loads(value) for value in offline.history(part, "iteration")]
        for part in (first, second)
    ]
    assert iterations[0][0] == 0 and set(iterations[0]) == {0, 1} and set(iterations[1]) == {2}
    assert offline.images(run) == 3


@pytest.mark.slow
def test_a_sweep_is_told_apart_by_what_it_varies(tmp_path):
    """Names by delta and seed, a group for each delta with its seeds, every value in one column.

    Mutation: group by the sweep, or by the run's name; name runs by their seed alone; log what
    `algorithm` gathers.
    """
    settings = ("debug=smoke", "num_iterations=1", "viewing.every=0", "evaluation.max_prompts=1")
    result = train(
        "-m",
        *settings,
        "logger=wandb",
        "logger.wandb.mode=offline",
        "logger.wandb.notes=a try",
        "logger.wandb.log_model=true",
        "loss.delta=1e-6,1e-5",
        "seed=0,1",
        "hydra.sweep.dir=sweep",
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    names, groups = [], defaultdict(list)
    for number in range(4):
        (segment,) = offline.segments(tmp_path / "sweep" / str(number))
        (start,) = offline.of_kind(segment, "run")[:1]
        config = offline.config(segment)
        assert start.run_group == config["condition"]
        assert start.display_name == f"{start.run_group} seed={config['seed']}"
        assert (start.notes, config["sweep"]) == ("a try", "sweep")
        assert config["choices"].items() >= {"sampler": "cps", "loss": "dppo"}.items()
        assert set(config["algorithm"]) == {"_target_", "diagnostics"}
        assert config["loss"]["delta"] in (1e-6, 1e-5)
        assert "rank" in config["lora"] and "tuning" not in config
        (artifact,) = offline.artifacts(segment)
        assert (artifact.type, artifact.name) == ("model", f"{start.run_id}-lora")
        names.append(start.display_name)
        groups[start.run_group].append((config["loss"]["delta"], config["seed"]))
    assert len(set(names)) == 4
    assert sorted(groups.values()) == [[(1e-6, 0), (1e-6, 1)], [(1e-5, 0), (1e-5, 1)]]
    for group, [(delta, _), _] in groups.items():
        label, _, digest = group.partition(" #")
        assert label == f"shapes-cps-dppo loss.delta={delta:.0e}"
        assert len(digest) == 6


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
