"""The embedded pipeline through `model=derived`, from the command line to an export."""

import csv
import json

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from families import FAMILIES
from PIL import Image
from runs import train
from safetensors.torch import load_file

from flowrl.models.loading import resolve
from flowrl.runs.files import PARITY

SHORT = ("debug=smoke", "logger=none", "embeddings.chunk=1", "data.prompts.count=16")
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


def clips(family, frames, folder, *more):
    """A run on a family's small random pipeline, at 32 x 64 pixels."""
    pipeline = FAMILIES[family].save(folder / family)
    call = f"model.call={{height: 32, width: 64, num_frames: {frames}, max_sequence_length: 64}}"
    options = (*CLIPS, f"model.pretrained={pipeline}", call, *SHORT, "gate_tolerance=5e-7")
    result = train(*options, *more, f"run_dir={folder}/run", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["wan21", "ltx_video"])
def test_a_video_model_trains_on_clips(family, tmp_path):
    """Two iterations on nine frames, with what moves measured, strips of four frames below each
    other and a moving grid of all nine.

    Mutation: score or draw clips as pictures, or measure motion of none.
    """
    run = clips(
        family,
        9,
        tmp_path,
        "viewing.num_shown=3",
        "reward=jpeg_incompressibility",
        "frames.reduce=min",
    )
    assert len(rows(run)) == 2
    panels = json.loads((run / "summary.json").read_text())["eval"]["after"]["panel"]
    assert panels["motion"] > 0.01 and panels["motion_variation"] > 0
    before = load_file(run / "images" / "before.safetensors")
    assert before["images"].shape == (3, 9, 3, 32, 64)
    with Image.open(run / "images" / "000002.png") as strips:
        assert strips.width > 2 * 4 * 128 and strips.height > 3 * 128
        size = strips.size
    with Image.open(run / "images" / "000002.gif") as moving:
        assert moving.n_frames == 9 and moving.size != size


@pytest.mark.slow
def test_a_video_model_trains_on_single_frames_along_its_own_grid(tmp_path):
    """Five axes of state, bfloat16, guidance of two passes. Mutation: keep the frames' axis."""
    guided = ("model.dtype=bfloat16", "rollout.guidance_scale=3", "backend=large")
    run = clips("wan21", 1, tmp_path, *guided)
    assert len(rows(run)) == 2 and not list((run / "images").glob("*.gif"))
    checks = json.loads((run / PARITY).read_text())["checks"]
    assert [check["guidance_scale"] for check in checks] == [3.0, 1.0]
    assert list((run / "lora").glob("*.safetensors"))
