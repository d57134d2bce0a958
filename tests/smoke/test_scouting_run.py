"""Whole runs with scouting, as a user starts and resumes them."""

import csv
import json
import shutil

import pytest
import torch
from runs import train
from safetensors.torch import load_file

WORDS = ("experiment=sol_rl", "debug=smoke", "scouting.candidates=6", "viewing.every=0")
"""Two prompts with 6 candidates each, of which 4 are kept."""


def rows(run):
    table = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in table]


def test_a_run_counts_its_candidates_and_resumes_bitwise(tmp_path):
    """12 candidates and 8 samples an iteration. A run that is resumed after its first iteration
    chooses as the one that went on, to the last bit.

    Mutation: count what is trained on alone, or keep a choice beyond its iteration.
    """
    whole, part = tmp_path / "whole", tmp_path / "part"
    result = train(*WORDS, "checkpoint.keep=9", f"run_dir={whole}", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "2 prompts x 6 candidates = 12, in 4 steps, 4 of each prompt kept" in result.stdout
    assert json.loads((whole / "summary.json").read_text())["images"] == 2 * (12 + 8)
    assert [row["samples"] for row in rows(whole)] == ["20", "40"]
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints" / "000002")
    result = train(f"resume={part}", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert rows(part) == rows(whole)
    for name in ("lora", "ema", "old", "optimizer"):
        file = f"checkpoints/000002/{name}.safetensors"
        ours, theirs = load_file(part / file), load_file(whole / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.slow
def test_two_processes_as_a_user_starts_them_choose_what_one_does(tmp_path):
    """In the first iteration, before weights differ by rounding: the scores of all candidates, and
    the rewards of what is trained on and how well the scores told them.

    Mutation: choose among a process's own candidates.
    """
    words = (*WORDS, "num_iterations=1", "batch.max_micro_batch=2", "trainer.accelerator=cpu")
    tables = []
    for name, more in (("one", ()), ("two", ("trainer=ddp", "trainer.devices=2"))):
        run = tmp_path / name
        result = train(*words, *more, f"run_dir={run}", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        tables.append(rows(run)[0])
    alone, both = tables
    exact = [key for key in alone if key.startswith("scouting/")] + ["samples"]
    assert len(exact) == 6 and {key: both[key] for key in exact} == {
        key: alone[key] for key in exact
    }
    for key in ("reward/mean", "reward/std"):
        assert float(both[key]) == pytest.approx(float(alone[key]), rel=1e-6)


def test_what_does_not_go_together_is_told_in_a_line(tmp_path):
    """Mutation: check it after weights are read, which a missing folder stops before."""
    words = ("scouting=best_worst", "debug=smoke", "model.pretrained=./nowhere")
    result = train(*words, cwd=tmp_path)
    [line] = result.stderr.splitlines()
    assert result.returncode == 1
    assert "scouting.num_steps=4, below rollout.num_steps=6" in line
    assert "rollout.shared_initial_noise=true makes equal: set it to false" in line
