"""A run on images of a folder, interrupted and resumed."""

import csv

import torch
from PIL import Image
from runs import train
from safetensors.torch import load_file

SETTINGS = ("debug=smoke", "num_threads=1", "evaluation.max_prompts=2", "learning_rate=constant")
SETTINGS += ("regularizer=data", "regularizer.batch=4", "regularizer.weight=1.0")


def rows(run):
    table = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in table]


def test_a_resumed_run_is_bitwise_the_whole_one(tmp_path):
    """And refuses images that changed. Mutation: count an update's images from the launch."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(6):
        Image.new("RGB", (48, 32 + number), (40 * number, 90, 200)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"{number} blue squares")
    settings = (*SETTINGS, f"regularizer.images.path={folder}")
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    result = train(*settings, f"run_dir={whole}", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "data regularisation       4 of 6 images an update x 2 sigmas" in result.stdout
    first = train(*settings, "num_iterations=1", f"run_dir={halves}", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    second = train(f"resume={halves}", "num_iterations=2", cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert [row["loss/data"] for row in rows(halves)] == [row["loss/data"] for row in rows(whole)]
    ours, theirs = (
        load_file(run / "checkpoints" / "000002" / "lora.safetensors") for run in (halves, whole)
    )
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    (folder / "0.txt").write_text("another caption")
    refused = train(f"resume={halves}", "num_iterations=3", cwd=tmp_path)
    assert refused.returncode == 1 and "changed since the run began" in refused.stderr
