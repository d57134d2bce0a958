"""The embedded pipeline through `model=derived`, from the command line to an export."""

import csv
import json

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from families import FAMILIES
from runs import train
from safetensors.torch import load_file

from flowrl.models.loading import resolve
from flowrl.runs.files import PARITY

SHORT = ("debug=smoke", "logger=none", "embeddings.chunk=1")
EMBEDDED = (
    "model=derived",
    "model.pretrained=embedded:pipeline",
    "model.without=[text_encoder_3,tokenizer_3]",
    "model.call={height: 32, width: 32, max_sequence_length: 0}",
    "model.dtype=float32",
    "model.has_guidance=false",
    "model.channels_last=true",
    # What conf/model/shapes.yaml says beside the adapter.
    "backend=plain",
    "batch.max_micro_batch=96",
    "evaluation.batch_size=126",
    "schedule=linear_shift",
    "grid.shift=2.0",
    "lora.rank=16",
    "lora.alpha=32",
    "trust={delta: 2e-5, clip: 1e-3, cps_clip: 1e-4, guard_clip: 2e-5}",
)


def rows(run):
    table = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    return [
        {name: value for name, value in row.items() if not name.startswith("perf/")}
        for row in table
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    place = tmp_path_factory.mktemp("derived")
    result = train(*EMBEDDED, *SHORT, f"run_dir={place}/run", cwd=place)
    assert result.returncode == 0, result.stderr
    assert "checking StableDiffusion3Pipeline against itself" in result.stdout
    return place / "run"


def test_its_metrics_are_the_hand_written_adapters(finished, tmp_path):
    """All of them bitwise, texts embedded one at a time, as `derived` does. Mutation: ask for the
    velocity at the step's end.
    """
    result = train("model=shapes", *SHORT, f"run_dir={tmp_path}/run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert rows(finished) == rows(tmp_path / "run")


def test_what_was_checked_stands_in_the_runs_record(finished):
    """Mutation: write what was measured before it is."""
    record = json.loads((finished / PARITY).read_text())
    (check,) = record["checks"]
    assert (record["pipeline"], record["dtype"]) == ("StableDiffusion3Pipeline", "float32")
    assert check["velocity"] == check["rollout"] == check["image"] == check["replay"] == 0
    assert check["num_steps"] == 6 and check["has_gradient"] > 20


def test_a_resumed_run_is_not_checked_again_and_is_bitwise_the_same(finished, tmp_path):
    """Mutations: check at every start, or forget what the check drew from a generator."""
    run = tmp_path / "run"
    first = train(*EMBEDDED, *SHORT, "num_iterations=1", f"run_dir={run}", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    second = train(f"resume={run}", "num_iterations=2", cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert "against itself" not in second.stdout
    for name in ("lora", "ema"):
        ours, theirs = (
            load_file(place / "checkpoints" / "000002" / f"{name}.safetensors")
            for place in (run, finished)
        )
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_its_export_loads_in_the_stock_pipeline(finished):
    """With its scale: no key is left over. Mutation: leave out the transformer's prefix."""
    pipe = StableDiffusion3Pipeline.from_pretrained(resolve("embedded:pipeline"))
    before = {name: value.clone() for name, value in pipe.transformer.named_parameters()}
    pipe.load_lora_weights(finished / "lora", adapter_name="ours")
    added = pipe.transformer.state_dict().keys() - before.keys()
    assert len([name for name in added if ".lora_" in name]) == 46


CLIPS = (
    "model=derived",
    "backend=plain",
    "model.dtype=float32",
    "rollout.num_steps=4",
    "rollout.trained={count: 1, low: 1, high: 2}",
    "batch.max_micro_batch=4",
    "lora.rank=4",
    "num_threads=1",
)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return FAMILIES["wan21"].save(tmp_path_factory.mktemp("pipelines") / "wan21")


def test_clips_are_refused_before_the_first_evaluation(video, tmp_path):
    """In one line. Mutation: check after the evaluation, whose scorer would fail instead."""
    call = "model.call={height: 32, width: 32, num_frames: 9, max_sequence_length: 64}"
    options = (*CLIPS, f"model.pretrained={video}", call, *SHORT)
    result = train(*options, f"run_dir={tmp_path}/run", cwd=tmp_path)
    assert result.returncode == 1
    assert "draws clips of 9 frames" in result.stderr.strip().splitlines()[-1]
    assert "evaluating" not in result.stdout


@pytest.mark.slow
def test_a_video_model_trains_on_single_frames_along_its_own_grid(video, tmp_path):
    """Five axes of state, bfloat16, guidance of two passes. Mutation: keep the frames' axis."""
    call = "model.call={height: 32, width: 32, num_frames: 1, max_sequence_length: 64}"
    options = (*CLIPS, f"model.pretrained={video}", call, *SHORT, "gate_tolerance=5e-7")
    guided = ("model.dtype=bfloat16", "rollout.guidance_scale=3", "backend=large")
    result = train(*options, *guided, f"run_dir={tmp_path}/run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(rows(tmp_path / "run")) == 2
    scales = [
        check["guidance_scale"]
        for check in json.loads((tmp_path / "run" / PARITY).read_text())["checks"]
    ]
    assert scales == [3.0, 1.0]
    assert list((tmp_path / "run" / "lora").glob("*.safetensors"))
