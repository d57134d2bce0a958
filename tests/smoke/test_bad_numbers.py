"""Whole runs whose numbers are none, or teach nothing: one line, status 1, and nothing lost."""

import json
import re

import pytest
from runs import ROOT, train

from flowrl.runs import checkpoint

QUICK = (
    "debug=smoke",
    "num_threads=1",
    "evaluation.max_prompts=2",
    "evaluation.num_steps=2",
    "evaluation.kl_samples=0",
)


def errors(result):
    return [line for line in result.stderr.splitlines() if line.startswith("error: ")]


def test_nan_at_the_end_is_told_and_the_run_goes_on_from_before(tmp_path, monkeypatch):
    """The last iteration leaves a NaN weight, with one checkpoint kept; resumed from it, the run
    finishes.

    Mutation: `finished` with NaN exported, or the good checkpoint replaced.
    """
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    fault = "+callbacks.poison={_target_: faults.Poison, after: 2, kind: ema}"
    folder = tmp_path / "run"
    result = train(*QUICK, "checkpoint.keep=1", fault, f"run_dir={folder}", cwd=tmp_path)
    assert result.returncode == 1
    (line,) = errors(result)
    assert re.search(r"after iteration 2: the weight \S+ \(ema\) holds NaN or infinity", line)
    assert (
        "the newest checkpoint is after iteration 1" in line and f"train.py resume={folder}" in line
    )
    assert [path.name for path in checkpoint.list_with_state(folder / "checkpoints")] == ["000001"]
    assert not (folder / "lora").exists()
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["error"]) == ("failed", "NotFinite")
    resumed = train(
        f"resume={folder}", "trust_folder=true", cwd=tmp_path
    )  # whose fault the project does not name
    assert resumed.returncode == 0, resumed.stderr
    assert (folder / "lora").is_dir()
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("is_missing", [True, False], ids=["all missing", "no change"])
def test_a_run_that_learned_nothing_ends_with_status_1(tmp_path, is_missing, monkeypatch):
    """A scorer that always fails, with all rewards allowed to be missing; a step below the weights'
    last bit.

    Mutation: `finished`, with the untouched LoRA exported.
    """
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    scorer = ["reward._target_=faults.Failing", "~reward.score", "evaluation.headline=reward"]
    missing = [*scorer, "max_missing=1"]
    overrides = missing if is_missing else ["optimizer.lr=1e-60"]
    folder = tmp_path / "run"
    result = train(*QUICK, *overrides, f"run_dir={folder}", cwd=tmp_path)
    assert result.returncode == 1
    (line,) = errors(result)
    assert "nothing was learned in 2 iterations: " in line
    assert ("no image has a reward" if is_missing else "no optimizer step changed a weight") in line
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["error"]) == ("nothing learned", "NothingLearned")
    assert not (folder / "lora").exists()
