"""Pipelines that edit pictures, from prompts with pictures to an export."""

import csv
import json

import numpy as np
import pytest
from families import FAMILIES
from PIL import Image
from runs import train

from flowrl.runs.files import PARITY

CALLS = {
    "flux1_kontext": "{height: 32, width: 48, max_sequence_length: 64, max_area: 1536, "
    "_auto_resize: false}",
    "qwen_image_edit_plus": "{height: 128, width: 192}",
}
SHORT = (
    *("model=derived", "model.dtype=float32", "backend=plain", "data=jsonl", "reward=preserve"),
    *("debug=smoke", "logger=none", "num_threads=1", "lora.rank=4", "embeddings.chunk=1"),
    *("rollout.num_steps=2", "rollout.trained={count: 1, low: 0, high: 1}"),
    *("evaluation.num_steps=2", "evaluation.batch_size=2", "evaluation.max_prompts=2"),
    *("batch.prompts_per_iteration=2", "batch.group_size=2", "batch.max_micro_batch=2"),
    *("batch.updates_per_iteration=1", "viewing.num_shown=2"),
)


def write_prompts(folder):
    """Prompts with pictures of two sizes, one with a mask of its left half."""
    folder.mkdir()
    pixels = np.random.default_rng(0)
    for name, (width, height) in {"a": (64, 48), "b": (48, 64)}.items():
        colours = pixels.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(colours).save(folder / f"{name}.png")
    mask = np.zeros((48, 64), dtype=np.uint8)
    mask[:, :32] = 255
    Image.fromarray(mask).save(folder / "kept.png")
    rows = (
        {"prompt": "make it red", "image": "a.png", "mask": "kept.png"},
        {"prompt": "make it blue", "image": "b.png"},
        {"prompt": "make it blue", "image": "a.png"},
    )
    path = folder / "edits.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def options(name, place):
    folder = place / name
    if not folder.is_dir():
        FAMILIES[name].save(folder)
    path = place / "prompts" / "edits.jsonl"
    if not path.is_file():
        write_prompts(path.parent)
    call = f"model.call={CALLS[name]}"
    return (*SHORT, f"model.pretrained={folder}", call, f"data.prompts.path={path}")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("edits")


@pytest.mark.parametrize(
    "name", ["flux1_kontext", pytest.param("qwen_image_edit_plus", marks=pytest.mark.slow)]
)
def test_an_editing_pipeline_is_checked_and_trained(name, place):
    """Two iterations, with source pictures on its sheets. Mutations: check the first prompt without
    its picture, or keep rows by their texts.
    """
    run = place / f"run-{name}"
    result = train(*options(name, place), f"run_dir={run}", cwd=place)
    assert result.returncode == 0, result.stderr
    (check,) = json.loads((run / PARITY).read_text())["checks"]
    assert check["velocity"] == check["rollout"] == check["image"] == check["replay"] == 0
    table = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    assert len(table) == 2
    assert all(0 < float(row["reward/mean"]) < 1 for row in table)
    assert list((run / "lora").glob("*.safetensors"))
    # A caption's source, and the image from before beside the one of now.
    widths = []
    for number in (0, 2):
        with Image.open(run / "images" / f"{number:06d}.png") as sheet:
            widths.append(sheet.width)
    assert widths[1] > widths[0] > 2 * 128


def test_what_does_not_suit_is_refused_before_weights_load(place):
    """A picture for a model that takes none, and none for one that needs it.

    Mutation: look at prompts after the weights are there.
    """
    pictured = options("flux1_kontext", place)
    plain = ("model=shapes", "data=jsonl", "reward=jpeg_compressibility")
    other = train(*plain, *pictured[5:-3], pictured[-1], cwd=place)
    assert other.returncode == 1
    assert "a SD3 takes none" in other.stderr.strip().splitlines()[-1]
    words = place / "words.jsonl"
    words.write_text('{"prompt": "a red circle"}\n')
    weights = place / "qwen_image_edit_plus" / "transformer"
    needy = options("qwen_image_edit_plus", place)
    for file in weights.glob("*.safetensors"):
        file.rename(file.with_suffix(".away"))
    try:
        arguments = (*needy, f"data.prompts.path={words}", "reward=jpeg_compressibility")
        result = train(*arguments, cwd=place)
    finally:
        for file in weights.glob("*.away"):
            file.rename(file.with_suffix(".safetensors"))
    assert result.returncode == 1
    assert "but a QwenImageEditPlusPipeline edits one" in result.stderr.strip().splitlines()[-1]
