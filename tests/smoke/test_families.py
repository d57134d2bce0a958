"""Each family of base models runs end to end through train.py, and mistakes about them end in one
line.
"""

import csv
import json

import pytest
from huggingface_hub import errors
from PIL import Image
from runs import make, train
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import FAMILIES

from flowrl.models import loading
from flowrl.models.embeddings import PromptEmbeddings
from flowrl.models.latents import latent_size
from flowrl.types import Prompt


def error_of(*overrides):
    with pytest.raises(Exception) as error:
        make(*overrides)
    from flowrl.launch.errors import explain

    return explain(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_two_iterations_of_each_family(name, tiny_pipelines, tmp_path):
    """In bfloat16, checkpointed, with embeddings on disk: as the model's YAML says, only small.

    Mutation: drop text encoders before the prompts are embedded, or hand the policy a model on
    another dtype.
    """
    family = FAMILIES[name]
    changed = ("model.dtype", "gate_tolerance", "embeddings.folder")
    own = [text for text in family.overrides(tiny_pipelines[name]) if not text.startswith(changed)]
    cache = f"embeddings.folder={tmp_path}/cache"
    result = train(*own, cache, "debug=smoke", f"run_dir={tmp_path}/run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "run"
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    assert len(rows) == 2
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"
    weights = load_file(run / "lora" / "pytorch_lora_weights.safetensors")
    assert all(key.startswith("transformer.") for key in weights)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 22 + family.has_negative


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [name for name in FAMILIES if not FAMILIES[name].repeats],
)
def test_two_iterations_of_pictures_that_are_no_squares(name, tiny_pipelines, tmp_path):
    """32 x 48 pixels, from the command line to the files: grids, numbers of pictures and the size
    that the LoRA's file names. Mutation: take one side for both anywhere.
    """
    own = FAMILIES[name].overrides(tiny_pipelines[name], (32, 48))
    result = train(*own, "debug=smoke", f"run_dir={tmp_path}/run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "run"
    assert len((run / "metrics.csv").read_text().splitlines()) == 3
    assert "finished" in (run / "summary.json").read_text()
    with safe_open(run / "lora" / "pytorch_lora_weights.safetensors", framework="pt") as file:
        assert file.metadata()["flowrl.resolution"] == "48x32"
    with Image.open(run / "images" / "000002.png") as sheet:
        assert min(sheet.size) > 128


def test_a_pipeline_of_another_family_is_named(tiny_pipelines):
    """Mutation: let diffusers look for components that are not there."""
    text = error_of("model=flux1_dev", f"model.pretrained={tiny_pipelines['sd3']}")
    assert "StableDiffusion3Pipeline" in text and "FluxPipeline" in text and "\n" not in text


def test_a_missing_folder_beside_others_is_no_hub_id(tmp_path, monkeypatch):
    """`models/mine` beside a folder `models`. Mutation: ask the hub for it, for a minute."""
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "no such folder" in error_of("model=sd35_medium", "model.pretrained=models/mine")


def test_resolution_must_fit_the_patches():
    """8 pixels a latent, 2 latents a patch: multiples of 16. Mutation: check the autoencoder's
    factor alone.
    """
    assert latent_size(512, 8, 2) == (64, 64) and latent_size([512, 768], 8, 2) == (64, 96)
    with pytest.raises(
        ValueError,
        match=r"model.resolution=\[512, 760\]: 760 must be a multiple of 16 .* 752 or 768",
    ):
        latent_size([512, 760], 8, 2)
    for wrong in (500, 520, 8, 0):
        with pytest.raises(ValueError, match=rf"model.resolution={wrong} must be a multiple of 16"):
            latent_size(wrong, 8, 2)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            (
                "model=flux1_dev",
                "model.has_guidance=false",
                "rollout.guidance_scale=1",
                "evaluation.guidance_scale=1",
            ),
            ("model.has_guidance=false", "as an input"),
        ),
        (
            ("model=flux2_klein_4b", "rollout.guidance_scale=4"),
            ("rollout.guidance_scale=4", "model.has_guidance"),
        ),
        (
            ("model=sd35_medium", "backend.attention=native"),
            ("backend.attention=native", "SD3Transformer2DModel", "_native_math"),
        ),
        (("model=flux1_dev", "backend.attention=warp"), ("backend.attention=warp",)),
        (
            ("model=flux1_dev", "backend.attention=sage"),
            ("backend.attention=sage", "no backward pass"),
        ),
        (
            ("model=flux1_dev", "backend.attention=_flash_3"),
            ("backend.attention=_flash_3", "_flash_3_hub"),
        ),
        (
            ("model=flux1_dev", "backend.attention=flash"),
            ("backend.attention=flash", "missing package"),
        ),
        (("model=sd35_medium", "model.resolution=256"), ("model.resolution=256", "128 pixels")),
        (
            ("model=sd35_medium", "model.resolution=[64,256]"),
            ("model.resolution=[64, 256]", "128 pixels a side"),
        ),
        (
            ("model=sd35_medium", "model.resolution=36"),
            ("model.resolution=36", "multiple of 8", "32 or 40"),
        ),
    ],
)
def test_options_that_a_model_does_not_have(overrides, parts, tiny_pipelines):
    """Mutation: ignore a guidance scale, or an attention backend, that the model never reads."""
    name = {"sd35": "sd3", "flux1": "flux1", "flux2": "flux2_klein"}[overrides[0][6:11].rstrip("_")]
    own = [
        text
        for text in FAMILIES[name].overrides(tiny_pipelines[name])
        if not text.startswith("model=")
    ]
    text = error_of(overrides[0], *own, *overrides[1:])
    assert all(part in text for part in parts), text


HUB = {
    "gated": (errors.GatedRepoError, ("gated", "licence", "HF_TOKEN")),
    "unknown": (errors.RepositoryNotFoundError, ("no such repository", "HF_TOKEN")),
    "revision": (errors.RevisionNotFoundError, ("model.revision=v9",)),
    "no index": (errors.RemoteEntryNotFoundError, ("model_index.json", "diffusers layout")),
    "offline": (errors.LocalEntryNotFoundError, ("cannot be reached",)),
}


@pytest.mark.parametrize("case", HUB)
def test_hub_ids_that_cannot_be_loaded(case, monkeypatch):
    """Mutation: report a gated repository as one that does not exist, which its class is a kind
    of.
    """
    kind, parts = HUB[case]

    def refuse(*_, **__):
        raise kind.__new__(kind)

    monkeypatch.setattr(loading, "hf_hub_download", refuse)
    text = error_of("model=flux1_dev", "model.pretrained=org/name", "model.revision=v9")
    assert text.startswith("model.pretrained=org/name: ") and "\n" not in text
    assert all(part in text for part in parts), text


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_that_is_too_long_is_warned_of_once(name, tiny_pipelines, tmp_path, caplog):
    """With the part that is lost: some of the prompt, not of its beginning; and again in a run that
    finds it embedded.

    Mutation: warn at every batch, cut in silence as the chat templates do, or name the part that is
    kept.
    """
    policy, _, _ = make(*FAMILIES[name].overrides(tiny_pipelines[name]))
    long = " ".join(f"thing {i} and" for i in range(40))
    prompts = [
        Prompt("a cat"),
        *(Prompt(f"{long} {animal}") for animal in ("birds", "cats", "dogs")),
    ]
    for _ in range(2):
        caplog.clear()
        PromptEmbeddings(policy.model, prompts, folder=str(tmp_path), chunk=2)
        warnings = [record.getMessage() for record in caplog.records]
        assert len(warnings) == 1, warnings
        assert "which are cut: 3 of 4;" in warnings[0]
        prompt, lost = (
            "".join(filter(str.isalnum, text))
            for text in (long, warnings[0].split("it loses ")[1][:60])
        )
        assert prompt.index(lost) > 20
        policy.model.text.pipeline = None  # the second time nothing may be tokenized
