"""The scripts around base models, run in process on small random pipelines."""

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from PIL import Image
from tiny import FAMILIES

from flowrl.cli import export as export_lora
from flowrl.cli import generate
from flowrl.runs import checkpoint
from flowrl.tuning.formats import read
from flowrl.tuning.lora_file import LoRAFile
from flowrl.tuning.writer import write

LAYERS = (
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.1.ff.net.2",
    "single_transformer_blocks.1.attn.to_v",
)


@pytest.fixture
def adapter(tmp_path):
    """A LoRA file for the small FLUX.1."""
    torch.manual_seed(0)
    a = {name: torch.randn(4, 128 if "ff" in name else 32) for name in LAYERS}
    return write(
        LoRAFile(a, {name: torch.randn(32, 4) for name in a}, dict.fromkeys(a, 8.0)),
        tmp_path,
        "diffusers",
    )


def opened(path):
    with Image.open(path) as image:
        image.load()
    return image


def test_pictures_of_base_and_lora_from_the_same_noise(call, adapter, tiny_pipelines, tmp_path):
    """Mutation: leave the LoRA on for the base, draw other noise for it, or lose the prompt in the
    file.
    """
    own = FAMILIES["flux1"].overrides(tiny_pipelines["flux1"])
    prompts = ("--prompt", "a red circle", "--prompt", "a blue square", "--count", 2)
    for name, more in (("with", ("--lora", adapter)), ("without", ())):
        status, _, err = call(
            generate, *own, "evaluation.num_steps=3", *prompts, "--out", tmp_path / name, *more
        )
        assert status == 0, err
    pictures = {path.name: opened(path) for path in (tmp_path / "with").glob("*.png")}
    assert pictures.keys() == {
        f"00{i}-{j}-{name}.png" for i in (0, 1) for j in (0, 1) for name in ("base", "lora")
    } | {"grid.png"}
    for i, text in enumerate(("a red circle", "a blue square")):
        base, changed = pictures[f"00{i}-1-base.png"], pictures[f"00{i}-1-lora.png"]
        assert base.info["prompt"] == changed.info["prompt"] == text
        assert changed.info["lora"] == str(adapter) and "lora" not in base.info
        alone = opened(tmp_path / "without" / f"00{i}-1-base.png")
        assert np.array_equal(np.array(base), np.array(alone)) and not np.array_equal(
            np.array(base), np.array(changed)
        )
        assert not np.array_equal(np.array(base), np.array(pictures[f"00{i}-0-base.png"]))
    assert pictures["grid.png"].width > 4 * 32


def test_prompts_of_a_file_of_json_objects(call, tiny_pipelines, tmp_path):
    """Their prompts are drawn, whatever the ending's case. Mutation: draw pictures of JSON."""
    path = tmp_path / "prompts.JSONL"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a red circle", "tag": "single"}\n')
    own = (*FAMILIES["flux1"].overrides(tiny_pipelines["flux1"]), "evaluation.num_steps=2")
    status, _, err = call(generate, *own, "--prompts", path, "--out", tmp_path / "out")
    assert status == 0, err
    assert opened(tmp_path / "out" / "000-0-base.png").info["prompt"] == "a red circle"
    path.write_text('{"prompt": null}\n')
    for words, reason in (
        (("--prompts", path), "prompts.JSONL line 1"),
        (("--prompt", " "), "--prompt: the prompt is"),
    ):
        status, _, err = call(generate, *own, *words, "--out", tmp_path / "none")
        assert status == 1 and reason in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "none").exists()


def test_pictures_of_a_fully_trained_transformer(call, tiny_pipelines, tmp_path):
    """Beside the base, and named by its option. Mutation: draw both with the trained weights, or
    with the base's.
    """
    own = FAMILIES["flux1"].overrides(tiny_pipelines["flux1"])
    network = FluxTransformer2DModel.from_pretrained(
        tiny_pipelines["flux1"], subfolder="transformer"
    )
    with torch.no_grad():
        network.proj_out.bias += 0.5
    network.save_pretrained(tmp_path / "transformer")
    words = (*own, "evaluation.num_steps=3", "--prompt", "a cat", "--out", tmp_path / "out")
    status, _, err = call(generate, *words, "--transformer", tmp_path / "transformer")
    assert status == 0, err
    status, _, err = call(generate, *words[:-1], tmp_path / "base")
    assert status == 0, err
    base, changed = (
        opened(tmp_path / "out" / f"000-0-{name}.png") for name in ("base", "transformer")
    )
    assert changed.info["transformer"] == str(tmp_path / "transformer")
    assert np.array_equal(np.array(base), np.array(opened(tmp_path / "base" / "000-0-base.png")))
    assert not np.array_equal(np.array(base), np.array(changed))


def test_a_lora_of_another_model_draws_nothing(call, adapter, tiny_pipelines, tmp_path):
    """Mutation: draw with the base model where no layer fits."""
    own = FAMILIES["sd3"].overrides(tiny_pipelines["sd3"])
    status, _, err = call(
        generate, *own, "--prompt", "a cat", "--lora", adapter, "--out", tmp_path / "out"
    )
    assert status == 1 and "another architecture" in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_export_converts_and_checks(call, adapter, tiny_pipelines, tmp_path):
    """Mutation: convert without a look at the model that was named."""
    status, out, err = call(export_lora, adapter, "--format", "comfy", "--out", tmp_path / "comfy")
    assert status == 0 and "3 layers" in out, err
    assert read(tmp_path / "comfy").alpha == read(adapter).alpha
    flux, sd3 = (f"model.pretrained={tiny_pipelines[name]}" for name in ("flux1", "sd3"))
    assert (
        call(
            export_lora,
            adapter,
            "model=flux1_dev",
            flux,
            "--format",
            "peft",
            "--out",
            tmp_path / "peft",
        )[0]
        == 0
    )
    status, _, err = call(
        export_lora, adapter, "model=sd35_medium", sd3, "--format", "peft", "--out", tmp_path / "no"
    )
    assert status == 1 and "another architecture" in err and not (tmp_path / "no").exists()


def test_export_of_a_stopped_run_is_its_newest_checkpoints(call, tmp_path):
    """At alpha from the run's configuration. Mutation: take the oldest, or alpha as the rank."""
    for number in (5, 10):
        keys = {f"transformer_blocks.0.attn.to_q.lora_{part}.policy.weight": part for part in "AB"}
        ema = {
            key: torch.full((2, 3) if part == "A" else (3, 2), float(number))
            for key, part in keys.items()
        }
        checkpoint.save(
            tmp_path / "run" / "checkpoints",
            keep=2,
            weights={"ema": ema},
            state={"num_iterations": number},
        )
    (tmp_path / "run" / "config.yaml").write_text("lora: {rank: 2, alpha: 6}\n")
    status, out, err = call(export_lora, tmp_path / "run", "--format", "comfy")
    assert status == 0 and "checkpoint 000010" in out, err
    found = read(tmp_path / "run" / "lora_comfy")
    assert list(found.alpha.values()) == [6.0] and float(next(iter(found.a.values()))[0, 0]) == 10.0
