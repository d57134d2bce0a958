"""A run that begins from an earlier one's LoRA, through train.py and back."""

import json
import shutil

import pytest
import torch
from runs import train
from safetensors.torch import load_file

from flowrl.cli import arguments
from flowrl.cli import evaluate as evaluate_program
from flowrl.tuning import formats
from flowrl.tuning.formats import read


@pytest.fixture(scope="module")
def second_run(finished_run, tmp_path_factory):
    """Two iterations from the finished run's LoRA, given as a file that is gone afterwards."""
    place = tmp_path_factory.mktemp("second")
    shutil.copy(
        finished_run / "lora" / "pytorch_lora_weights.safetensors", place / "sft.safetensors"
    )
    words = (
        "debug=smoke",
        "viewing.every=0",
        "penalty=kl",
        "lora.start=sft.safetensors",
        "run_dir=outputs/second",
    )
    result = train(*words, cwd=place)
    assert result.returncode == 0, result.stderr
    assert "beginning from" in result.stdout and "rank 16, alpha 32" in result.stdout
    (place / "sft.safetensors").unlink()
    return place / "outputs" / "second"


def evaluations(run):
    return json.loads((run / "summary.json").read_text())["eval"]


def test_before_is_the_earlier_runs_after(second_run, finished_run):
    """All that is measured of the images; the drift is from the start, so it begins at 0 and then
    grows.

    Mutation: begin from the base, at another scale, or measure from the base.
    """
    before, after = evaluations(second_run)["before"], evaluations(finished_run)["after"]
    for mine, theirs in ((before, after), (before["held_out"], after["held_out"])):
        same = mine.keys() - {"kl_ref", "held_out", "alarms"}
        assert {key: mine[key] for key in same} == {key: theirs[key] for key in same}
        assert mine["kl_ref"] == 0 < theirs["kl_ref"]
    assert evaluations(second_run)["after"]["kl_ref"] > 0


def test_its_last_iteration_again_without_the_file(second_run):
    """Resumed from the checkpoint before, bitwise the same weights. Mutation: a reference that is
    lost on the way, or a start that is read from where it was.
    """
    last = second_run / "checkpoints" / "000002"
    weights = {
        name: load_file(last / f"{name}.safetensors") for name in ("lora", "ema", "optimizer")
    }
    after = evaluations(second_run)["after"]
    shutil.rmtree(last)
    result = train(f"resume={second_run}", cwd=second_run)
    assert result.returncode == 0, result.stderr
    for name, tensors in weights.items():
        again = load_file(last / f"{name}.safetensors")
        assert tensors.keys() == again.keys()
        assert all(torch.equal(value, again[key]) for key, value in tensors.items())
    assert evaluations(second_run)["after"] == after


def test_it_is_evaluated_as_it_measured_itself(second_run, finished_run, tmp_path):
    """Beside the base and the run that it began from: its own drift is from there. Mutation:
    measure it from the base, or draw the base through the LoRA that the first run began from.
    """
    script = evaluate_program
    words = [
        f"second={second_run}",
        "base",
        f"first={finished_run}",
        "--out",
        str(tmp_path),
        "num_threads=1",
    ]
    script.run(arguments.evaluate().parse_intermixed_args(words))
    found = json.loads((tmp_path / "results.json").read_text())["held_in"]
    earlier = evaluations(finished_run)
    known = {
        "second": evaluations(second_run)["after"],
        "base": earlier["before"],
        "first": earlier["after"],
    }
    for label, values in known.items():
        assert found[label]["metrics"]["reward"]["mean"] == pytest.approx(
            values["reward"], abs=1e-5
        )
        assert found[label]["kl_ref"] == pytest.approx(values["kl_ref"], rel=1e-3, abs=1e-9)
    assert read(second_run).alpha == read(finished_run).alpha


@pytest.mark.slow
def test_a_sweep_refuses_what_the_file_says_otherwise(finished_run, tmp_path):
    """As a single run does, and takes from it what nobody says. Mutation: take in the job's process
    what was typed, which it does not know.
    """
    lora = finished_run / "lora"
    words = ("debug=smoke", "num_iterations=1", "viewing.every=0", f"lora.start={lora}")
    result = train("-m", *words, "lora.rank=8,16", "hydra.sweep.dir=sweep", cwd=tmp_path)
    assert result.returncode == 1
    job, other = tmp_path / "sweep" / "0", tmp_path / "sweep" / "1"
    assert f"lora.rank=8, but lora.start={lora} has rank 16" in (job / "job.log").read_text()
    assert json.loads((other / "summary.json").read_text())["status"] == "finished"
    assert set(read(formats.find(other / "lora")).ranks.values()) == {16}
