"""A short run leaves everything a user looks for, and its exported LoRA works in stock
diffusers.
"""

import csv
import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from runs import make, train
from safetensors.torch import load_file

from flowrl.models.loading import resolve
from flowrl.prompts.shapes import shapes_prompts
from flowrl.runs import glossary
from flowrl.shapes.grammar import parse
from flowrl.shapes.verify import verify
from flowrl.tuning.weights import load


def test_run_directory_is_complete(finished_run):
    """Mutation: skip the evaluation at the end, or point outputs/latest at the parent folder."""
    names = {path.name for path in finished_run.iterdir()}
    assert {"config.yaml", "metrics.csv", "summary.json", "images", "checkpoints", "lora"} <= names
    summary = json.loads((finished_run / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert 0 <= summary["eval"]["before"]["strict"] <= 1
    assert 0 <= summary["eval"]["after"]["strict"] <= 1
    assert (
        summary["seconds"] > 0
        and summary["images_per_second"] > 0
        and 0.1 < summary["peak_memory_gib"] < 24
    )
    assert summary["images"] == 4 * 8
    sheet = Image.open(finished_run / "images" / "000004.png")
    assert len(sheet.getcolors(1 << 24)) > 100


def test_metrics_csv_has_a_row_per_iteration_and_only_known_names(finished_run):
    """Mutation: append the row twice, or log a name that the glossary lacks."""
    rows = list(csv.DictReader((finished_run / "metrics.csv").read_text().splitlines()))
    assert [int(row["iteration"]) for row in rows] == [1, 2, 3, 4]
    glossary.check(rows[0])
    assert all(0 <= float(row["reward/mean"]) <= 1 for row in rows)
    assert float(rows[-1]["eval/held_in/kl_ref"]) > float(rows[0]["eval/held_in/kl_ref"]) == 0


def test_what_is_printed_fits_80_columns(finished_run):
    """All but a path of the user's. Mutation: print an evaluation in one line."""
    (printed,) = finished_run.parents[2].glob("printed.txt")
    lines = printed.read_text().splitlines()
    assert f"finished: {finished_run}" in lines and "  summary.json, images/, lora/" in lines
    assert "evaluation after (iteration 4), images/000004.png:" in lines
    assert [line for line in lines if len(line.replace(str(finished_run), "")) > 80] == []


def test_only_lora_is_saved(finished_run):
    """Mutation: save the whole state dict."""
    weights = load_file(finished_run / "checkpoints" / "000004" / "lora.safetensors")
    assert all(".policy." in name for name in weights)
    assert sum(tensor.numel() for tensor in weights.values()) < 300_000


def test_exported_lora_gives_the_evaluation_images_in_stock_diffusers(finished_run):
    """Mutation: export the trained weights instead of the EMA's, or drop alpha from the
    metadata.
    """
    policy, _, evaluator = make(config=finished_run, base=())
    checkpoint = finished_run / "checkpoints" / "000004"
    load(policy.tuning.parameters(), load_file(checkpoint / "lora.safetensors"))
    policy.ema.weights = load_file(checkpoint / "ema.safetensors")
    drawn = evaluator.evaluate(policy).images["held_in"]
    ours = torch.stack([drawn[row] for row in range(8)])

    pipe = StableDiffusion3Pipeline.from_pretrained(
        resolve("embedded:pipeline"), text_encoder_3=None, tokenizer_3=None
    )
    pipe.load_lora_weights(finished_run / "lora")
    pipe.set_progress_bar_config(disable=True)
    prompts = [
        prompt.text
        for prompt in evaluator.sets["held_in"]
        for _ in range(evaluator.images_per_prompt)
    ][:8]
    arguments = {"guidance_scale": 1.0, "max_sequence_length": 0, "output_type": "pt"}
    count = len(evaluator.intervals)
    grid = {"sigmas": [(count - k) / count for k in range(count)], "num_inference_steps": count}
    noise = evaluator.initial_noise(policy, 8)
    stock = pipe(prompts, latents=noise, **grid, **arguments).images
    assert (ours - stock).abs().max() <= 1 / 255
    pipe.unload_lora_weights()
    base = pipe(prompts, latents=noise, **grid, **arguments).images
    assert (base - stock).abs().max() > 1 / 255


def test_another_tracker_and_method_run(tmp_path):
    """Mutation: misname a callback hook, or hand images to a tracker in another layout."""
    result = train(
        "debug=smoke",
        "num_iterations=1",
        "logger=tensorboard",
        "sampler=flow_sde",
        "loss=grpo",
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    run = tmp_path / "outputs" / "latest"
    assert list((run / "tensorboard").glob("events*"))


@pytest.mark.slow
def test_stock_pipeline_loads_the_embedded_folder_as_it_is():
    """The default call of stock diffusers draws what the caption says about as often as our
    evaluation does.

    Mutation: ship without the silent T5 (loading fails), or train without zero tokens (the default
    call degrades).
    """
    prompts = [prompt.text for prompt in shapes_prompts(split="held_in", count=140, seed=9)]
    captions = [parse(text) for text in prompts]
    noise = torch.randn(140, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scores = []
    for length, left_out in ((256, {}), (0, {"text_encoder_3": None, "tokenizer_3": None})):
        pipe = StableDiffusion3Pipeline.from_pretrained(resolve("embedded:pipeline"), **left_out)
        pipe.set_progress_bar_config(disable=True)
        call = {
            "num_inference_steps": 12,
            "guidance_scale": 1.0,
            "max_sequence_length": length,
            "output_type": "np",
        }
        images = pipe(prompts, latents=noise, **call).images
        scores.append(np.mean([verdict.soft for verdict in verify(images, captions)]))
    assert abs(scores[0] - scores[1]) < 0.06 and min(scores) > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dppo", "grpo", "cps", "guard", "nft"])
@pytest.mark.parametrize("sampler", ["cps", "flow_sde", "dance_sde", "ode", "dpm2"])
def test_every_pair_runs_or_is_refused(sampler, loss, tmp_path):
    """Mutation: a pair that composes and then fails in the loop."""
    is_deterministic = sampler in ("ode", "dpm2")
    needed = {"nft": is_deterministic, "guard": sampler == "flow_sde", "cps": sampler == "cps"}
    is_legal = needed.get(loss, not is_deterministic)
    result = train(
        "debug=smoke",
        f"sampler={sampler}",
        f"loss={loss}",
        f"run_dir={tmp_path / 'run'}",
        cwd=tmp_path,
    )
    assert (result.returncode == 0) == is_legal, result.stderr
    if not is_legal:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        assert len(lines) == 1 and "loss" in lines[0] and "sampler" in lines[0]
