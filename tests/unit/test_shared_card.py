"""The card of published weights: it loads them, and says where they come from."""

import json

import pytest
import torch
import yaml
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file
from shared_run import HOME, LORA, edit, write

from flowrl.errors import UserError
from flowrl.models.loading import resolve
from flowrl.runs.files import file_digest
from flowrl.sharing.folder import examine


def test_the_folder_loads_in_stock_diffusers(finished_run, tmp_path, awake_policy):
    """By the very lines of the card. Mutation: lose alpha, or write another format."""
    card = write(finished_run, tmp_path / "out")
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")}
    assert names == {"README.md", "config.yaml", LORA, "images/before_and_after.png"}
    code = card.split("```python\n")[1].split("```")[0]
    code = code.replace('"me/lora"', f'"{tmp_path / "out"}"')
    code = code.replace('"image.png"', f'"{tmp_path / "image.png"}"')
    torch.manual_seed(0)
    exec(compile(code, "card", "exec"), {})
    pipe = StableDiffusion3Pipeline.from_pretrained(
        resolve("embedded:pipeline"), text_encoder_3=None, tokenizer_3=None
    )
    pipe.load_lora_weights(finished_run / "lora")
    arguments = {"num_inference_steps": 16, "guidance_scale": 1.0, "max_sequence_length": 0}
    prompt = "a red circle above a blue square"
    torch.manual_seed(0)
    drawn = pipe(prompt, **arguments).images[0]
    assert Image.open(tmp_path / "image.png").tobytes() == drawn.tobytes()
    mine, shared = load_file(finished_run / "lora" / LORA), load_file(tmp_path / "out" / LORA)
    assert mine.keys() == shared.keys()
    assert all(torch.equal(mine[name], shared[name]) for name in mine)


def test_the_card_says_what_the_run_was(finished_run, tmp_path):
    """Mutation: a head that the hub cannot read, or a base that is not there."""
    card = write(finished_run, tmp_path / "out")
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["flowrl", "reinforcement-learning", "flow-matching", "flow-dppo", "lora"],
    }
    for words in (
        "trained by [Flow-DPPO](https://arxiv.org/abs/2606.11025) on the reward `ShapesReward`",
        "ships inside FlowRL, not on the hub: `pip install flowrl-lightning`",
        "| **strict** | 0.25 | 0.75 |",
        "| **strict** | 0.25 | 0.125 |",
        "dropped if D >= delta and (A > 0 and r > 1",
        "| prompts | shapes\\_prompts(split=held\\_in, count=2100, seed=1) |",
        "| iterations | 2 of 2 |",
        "| time | 5 seconds |",
        "- after iteration 1: `lr` from `1` to `x|y`",
        "(commit `0123456789`): torch 2.9.0.",
    ):
        assert words in body, words
    assert body.count("Its headline is lower after training than before.") == 1
    assert "\n\n\n" not in body and "![Before and after](images/before_and_after.png)" in body


def test_a_model_of_the_hub_is_named_in_the_head(finished_run, tmp_path):
    """Mutation: claim a licence, or leave the relation to chance."""
    path = finished_run / "config.yaml"
    config = yaml.safe_load(path.read_text())
    base = "stabilityai/stable-diffusion-3.5-medium"
    config["model"] |= {"pretrained": base, "max_sequence_length": 256, "resolution": 512}
    config["model"]["quantization"] = "nf4"
    path.write_text(yaml.safe_dump(config))
    edit(finished_run / "provenance.json", inputs={})
    card = write(finished_run, tmp_path / "out")
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["base_model"] == base and head["base_model_relation"] == "adapter"
    assert "license" not in head
    assert f"for [{base}](https://huggingface.co/{base})" in card
    assert f'DiffusionPipeline.from_pretrained(\n    "{base}",\n' in card
    assert "text_encoder_3" not in card and "    max_sequence_length=256," in card
    assert "| base in training and pictures, held in | nf4 |" in card


@pytest.mark.parametrize("place", [f"{HOME}/models/sd35", "models/sd35"])
def test_a_folder_is_not_named_as_a_repository(finished_run, tmp_path, place):
    """Wherever it is pushed from. Mutation: go by the form of its path."""
    path = finished_run / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["model"]["pretrained"] = place
    path.write_text(yaml.safe_dump(config))
    record = {"value": place, "digest": "0" * 64, "kind": "folder"}
    edit(finished_run / "provenance.json", inputs={"model.pretrained": record})
    card = write(finished_run, tmp_path / "out")
    assert "base_model" not in yaml.safe_load(card.split("---\n")[1])
    assert "the folder `sd35`" in card and str(HOME) not in card
    assert "models/sd35" not in card + (tmp_path / "out" / "config.yaml").read_text()
    assert examine(finished_run, None).notes == []


def test_an_early_run_says_that_its_base_is_a_guess(finished_run, tmp_path):
    """Mutation: guess in silence, or guess that it is somebody's repository."""
    path = finished_run / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["model"]["pretrained"] = "models/sd35"
    path.write_text(yaml.safe_dump(config))
    edit(finished_run / "provenance.json", inputs=None)
    assert "the folder `sd35`" in write(finished_run, tmp_path / "out")
    assert examine(finished_run, None).notes == [
        "this run does not record whether model.pretrained=models/sd35 was a folder; the card "
        "takes it for a folder"
    ]


def estimate(mean, half):
    return {"mean": mean, "low": mean - half, "high": mean + half, "num_prompts": 9}


def evaluated(folder, weights):
    """An evaluation of the base model, of these weights, and of others."""
    subjects = {}
    digests = {"base": None, "mine": weights, "other": "0"}
    for i, (label, digest) in enumerate(digests.items()):
        (folder / label).mkdir(parents=True)
        (folder / label / "settings.json").write_text(json.dumps({"weights": digest}))
        subjects[label] = {
            "prompts": "9 prompts",
            "num_images": 18,
            "missing": 0.0,
            "kl_ref": 0.5 * i,
            "diversity": estimate(0.25, 0.125),
            "metrics": {"reward": estimate(0.5 + i / 8, 0.125), "strict": estimate(0.25, 0.125)},
            "changes": {"strict": estimate(-0.125 * i, 0.0625)} if i else {},
            "headline": "strict",
        }
    (folder / "results.json").write_text(json.dumps({"held_in": subjects}))
    return folder


def test_an_evaluation_gives_intervals_of_exactly_these_weights(finished_run, tmp_path):
    """Mutation: take the first run that was evaluated there."""
    folder = evaluated(tmp_path / "evaluation", file_digest(finished_run / "lora" / LORA))
    card = write(finished_run, tmp_path / "out", folder)
    for words in (
        "**held\\_in**: 9 prompts; 18 images of either model; 95 % intervals over prompts.",
        "| | before | after | change |\n|---|---|---|---|\n| **strict** | 0.25 [0.125, 0.375] | "
        "0.25 [0.125, 0.375] | -0.125 [-0.188, -0.0625] |",
        "| reward | 0.5 [0.375, 0.625] | 0.625 [0.5, 0.75] |  |",
        "| KL from the reference | 0 | 0.5 |  |",
        "Its headline is lower after training than before.",
    ):
        assert words in card, words
    (folder / "mine" / "settings.json").write_text('{"weights": "1"}')
    with pytest.raises(UserError, match=r"this run's weights were not evaluated there; run .*base"):
        examine(finished_run, folder)
    with pytest.raises(UserError, match=r"no results.json there; run .*evaluate"):
        examine(finished_run, tmp_path)


def test_a_run_without_evaluations_or_pictures_has_a_card(finished_run, tmp_path):
    """Mutation: a picture that is not there."""
    (finished_run / "images" / "000002.png").unlink()
    edit(finished_run / "summary.json", eval={})
    card = write(finished_run, tmp_path / "out")
    assert "The run was not evaluated before and after training." in card
    assert "![" not in card and not (tmp_path / "out" / "images").exists()


def test_a_card_of_clips_loads_clips(finished_run, tmp_path):
    """By what the check of a derived model drew, though its call names no number of frames.
    Mutation: ask the pipeline's output for images.
    """
    (finished_run / "parity.json").write_text(json.dumps({"checks": [{"num_frames": 81}]}))
    card = write(finished_run, tmp_path / "out")
    assert ").frames[0]\nexport_to_video(frames" in card
    assert yaml.safe_load(card.split("---\n")[1])["pipeline_tag"] == "text-to-video"


def test_a_card_loads_the_branch_that_was_pushed(finished_run, tmp_path):
    """Mutation: load the main branch, where another version may lie."""
    assert 'load_lora_weights("me/lora")' in write(finished_run, tmp_path / "out")
    card = write(finished_run, tmp_path / "out", revision="v2")
    assert 'load_lora_weights("me/lora", revision="v2")' in card
    # The base model's own is another.
    assert card.count("revision=") == 1
