"""What is published of a run: its weights, a card that says where they come from, and nothing of
the machine that it ran on.
"""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import StableDiffusion3Pipeline
from omegaconf import OmegaConf
from PIL import Image
from runs import awake, composed, make
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flowrl.cli import push
from flowrl.errors import UserError
from flowrl.models.loading import resolve
from flowrl.runs.files import file_digest
from flowrl.sharing import hub
from flowrl.sharing.folder import examine, write_folder
from flowrl.sharing.privacy import clean, published

HOME = Path.home()
LORA = "pytorch_lora_weights.safetensors"
NUMBERS = {"reward": 0.5, "strict": 0.25, "diversity": 0.2, "missing": 0.0, "families": {"a": 1}}


@pytest.fixture(scope="module")
def policy():
    """A policy with LoRA weights away from zero."""
    return awake(make()[0])


@pytest.fixture
def run(tmp_path, policy):
    """The folder of a finished run, whose configuration tells secrets and places."""
    folder = tmp_path / "my run"
    plain = OmegaConf.to_container(composed("debug=smoke"), resolve=True)
    plain |= {
        "run_dir": str(folder),
        "logger": {"wandb": {"entity": "acme", "folder": str(folder)}},
        "embeddings": {"folder": f"{HOME}/cache"},
        "http": {"url": "http://scorer.acme.internal:8000/score", "token": "abc"},
    }
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(folder / "images" / "000002.png")
    (folder / "config.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
    after = NUMBERS | {"strict": 0.75}
    summary = {
        "status": "finished",
        "iterations": 2,
        "images": 16,
        "eval": {
            "before": NUMBERS | {"held_out": NUMBERS},
            "after": after | {"held_out": NUMBERS | {"strict": 0.125}},
        },
        "seconds": 4.9,
        "versions": {"torch": "2.9.0"},
        "git_revision": "0123456789abcdef",
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    change = {"key": "lr", "before": "1", "after": f"{HOME}/x|y", "iteration": 1}
    (folder / "provenance.json").write_text(json.dumps({"changes": [change]}))
    policy.tuning.save(policy.model.pipeline, folder / "lora")
    return folder


def write(run, out, evaluation=None, repository="me/lora", revision=None):
    shared = examine(run, evaluation)
    write_folder(shared, out, repository, revision)
    return (out / "README.md").read_text()


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_folder_loads_in_stock_diffusers(run, tmp_path, policy):
    """By the very lines of the card. Mutation: lose alpha, or write another format."""
    card = write(run, tmp_path / "out")
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
    pipe.load_lora_weights(run / "lora")
    arguments = {"num_inference_steps": 16, "guidance_scale": 1.0, "max_sequence_length": 0}
    prompt = "a red circle above a blue square"
    torch.manual_seed(0)
    drawn = pipe(prompt, **arguments).images[0]
    assert Image.open(tmp_path / "image.png").tobytes() == drawn.tobytes()
    mine, shared = load_file(run / "lora" / LORA), load_file(tmp_path / "out" / LORA)
    assert mine.keys() == shared.keys()
    assert all(torch.equal(mine[name], shared[name]) for name in mine)


def test_the_card_says_what_the_run_was(run, tmp_path):
    """Mutation: a head that the hub cannot read, or a base that is not there."""
    card = write(run, tmp_path / "out")
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


def test_a_model_of_the_hub_is_named_in_the_head(run, tmp_path):
    """Mutation: claim a licence, or leave the relation to chance."""
    path = run / "config.yaml"
    config = yaml.safe_load(path.read_text())
    base = "stabilityai/stable-diffusion-3.5-medium"
    config["model"] |= {"pretrained": base, "max_sequence_length": 256, "resolution": 512}
    config["model"]["quantization"] = "nf4"
    path.write_text(yaml.safe_dump(config))
    edit(run / "provenance.json", inputs={})
    card = write(run, tmp_path / "out")
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["base_model"] == base and head["base_model_relation"] == "adapter"
    assert "license" not in head
    assert f"for [{base}](https://huggingface.co/{base})" in card
    assert f'DiffusionPipeline.from_pretrained(\n    "{base}",\n' in card
    assert "text_encoder_3" not in card and "    max_sequence_length=256," in card
    assert "| base in training and pictures, held in | nf4 |" in card


@pytest.mark.parametrize("place", [f"{HOME}/models/sd35", "models/sd35"])
def test_a_folder_is_not_named_as_a_repository(run, tmp_path, place):
    """Wherever it is pushed from. Mutation: go by the form of its path."""
    path = run / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["model"]["pretrained"] = place
    path.write_text(yaml.safe_dump(config))
    record = {"value": place, "digest": "0" * 64, "kind": "folder"}
    edit(run / "provenance.json", inputs={"model.pretrained": record})
    card = write(run, tmp_path / "out")
    assert "base_model" not in yaml.safe_load(card.split("---\n")[1])
    assert "the folder `sd35`" in card and str(HOME) not in card
    assert "models/sd35" not in card + (tmp_path / "out" / "config.yaml").read_text()
    assert examine(run, None).notes == []


def test_an_early_run_says_that_its_base_is_a_guess(run, tmp_path):
    """Mutation: guess in silence, or guess that it is somebody's repository."""
    path = run / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["model"]["pretrained"] = "models/sd35"
    path.write_text(yaml.safe_dump(config))
    edit(run / "provenance.json", inputs=None)
    assert "the folder `sd35`" in write(run, tmp_path / "out")
    assert examine(run, None).notes == [
        "this run does not record whether model.pretrained=models/sd35 was a folder; the card "
        "takes it for a folder"
    ]


def test_nothing_of_the_machine_is_published(run, tmp_path):
    """Mutation: copy config.yaml as it is."""
    out = tmp_path / "out"
    write(run, out)
    for path in out.rglob("*.*"):
        for secret in (str(HOME), str(run), str(tmp_path), "acme", "abc", "8000"):
            assert secret.encode() not in path.read_bytes(), (path, secret)
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["embeddings"] == {"folder": "cache"}
    assert config["http"] == {"url": "http://SERVER", "token": None}
    assert config["lora"]["targets"].startswith(r"transformer_blocks\.\d+")
    assert not config.keys() & {"logger", "run_dir", "resume", "trust_folder"}
    with safe_open(out / LORA, framework="pt") as opened:
        assert opened.metadata()["flowrl.method"] == "Flow-DPPO"


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("/home/me/prompts.txt", "prompts.txt"),
        ("~/prompts/a b.txt", "a b.txt"),
        ("../secret/prompts.txt", "prompts.txt"),
        (r"C:\Users\me\prompts.txt", "prompts.txt"),
        ("file:///home/me/conf", "conf"),
        ("file=/home/me/x.txt", "file=x.txt"),
        ("read '/home/me/x.txt', twice", "read 'x.txt', twice"),
        ("https://me:pw@host.internal/x?k=1", "http://SERVER"),
        ("https://huggingface.co/a/b", "https://huggingface.co/a/b"),
        ("https://huggingface.co/a/b?token=x", "https://huggingface.co/a/b"),
        ("HTTP://host:1/x", "http://SERVER"),
        ("s3://bucket/me/private.txt", "http://SERVER"),
        ("ask 10.0.0.5:8000", "ask http://SERVER"),
        ("Bearer abc.def", "TOKEN"),
        ("key hf_abcdefghijklmnopqrstu", "key TOKEN"),
        ("data/prompts.txt", "data/prompts.txt"),
        ("stabilityai/sd", "stabilityai/sd"),
        ("24/7 and/or 1 / 2", "24/7 and/or 1 / 2"),
        (r".*\.attn\.(to_[qkv]|to_out\.0)", r".*\.attn\.(to_[qkv]|to_out\.0)"),
    ],
)
def test_texts_are_cleaned(text, cleaned):
    """Mutation: a path of another system's, or a regular expression taken for one."""
    assert clean(text) == cleaned


def test_secrets_go_by_their_keys():
    """Whatever they hold; other words stay. Mutation: take any key with `token` in it, or texts
    alone.
    """
    config = {
        "a": [{"api_key": "x", "tokens": 16, "token_env": "ACME", "key": "family"}],
        "answer_token": "y",
        "password": 5,
        "token": {"value": "z"},
        "condition": "n reward.api_key=x #abc",
    }
    expected = copy.deepcopy(config)
    expected["a"][0]["api_key"] = expected["answer_token"] = None
    expected["password"] = expected["token"] = None
    # What was typed stands there again.
    del expected["condition"]
    assert published(config) == expected


def test_a_place_that_slips_through_stops_it(run, tmp_path):
    """Nothing is left behind. Mutation: publish all the same."""
    path = run / "config.yaml"
    config = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(config | {f"{run.resolve()}": 1}))
    with pytest.raises(UserError, match=r"holds .*my run, a place on this machine"):
        write(run, tmp_path / "out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["my run"]


def test_what_cannot_be_shared_is_refused(run, tmp_path):
    """Mutation: publish a run that was stopped, or a LoRA that does nothing."""
    with pytest.raises(UserError, match=r"no config.yaml there; give the folder of a finished run"):
        examine(tmp_path, None)
    with pytest.raises(UserError, match=r"nowhere: no such folder; give the folder of a finished"):
        examine(tmp_path / "nowhere", None)
    summary = run / "summary.json"
    edit(summary, status="stopped")
    with pytest.raises(UserError, match=r"status is 'stopped'.*continue it with: .*resume="):
        examine(run, None)
    edit(summary, status="finished")
    file = run / "lora" / LORA
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    zeros = {key: value * ("lora_B" not in key) for key, value in tensors.items()}
    save_file(zeros, file, metadata)
    with pytest.raises(UserError, match="all of its B are zero"):
        examine(run, None)
    first = next(iter(tensors))
    save_file(tensors | {first: tensors[first] * torch.nan}, file, metadata)
    with pytest.raises(UserError, match="not finite numbers"):
        examine(run, None)
    file.unlink()
    (run / "lora").rmdir()
    with pytest.raises(UserError, match="no weights to share"):
        examine(run, None)
    summary.unlink()
    with pytest.raises(UserError, match="status is 'unfinished'"):
        examine(run, None)


def test_another_folder_is_not_overwritten(run, tmp_path):
    """An earlier version of the same is, not a project that has a README.md too. Mutation: delete
    what lies there.
    """
    out = tmp_path / "out"
    write(run, out)
    card = write(run, out)
    (out / "src").mkdir()
    (out / "src" / "mine.py").touch()
    with pytest.raises(UserError, match=r"something else, such as src/mine\.py; give a new"):
        write(run, out)
    assert (out / "src" / "mine.py").exists() and (out / "README.md").read_text() == card
    assert not out.with_name("out.partial").exists()


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


def test_an_evaluation_gives_intervals_of_exactly_these_weights(run, tmp_path):
    """Mutation: take the first run that was evaluated there."""
    folder = evaluated(tmp_path / "evaluation", file_digest(run / "lora" / LORA))
    card = write(run, tmp_path / "out", folder)
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
        examine(run, folder)
    with pytest.raises(UserError, match=r"no results.json there; run .*evaluate"):
        examine(run, tmp_path)


def test_a_run_without_evaluations_or_pictures_has_a_card(run, tmp_path):
    """Mutation: a picture that is not there."""
    (run / "images" / "000002.png").unlink()
    edit(run / "summary.json", eval={})
    card = write(run, tmp_path / "out")
    assert "The run was not evaluated before and after training." in card
    assert "![" not in card and not (tmp_path / "out" / "images").exists()


def test_a_whole_transformer_is_copied_without_its_place(run, tmp_path, policy):
    """Mutation: publish where its base model lies."""
    whole = run / "transformer"
    whole.mkdir()
    save_file({"x": torch.ones(2)}, whole / "diffusion_pytorch_model.safetensors")
    settings = {"_class_name": "SD3Transformer2DModel", "_name_or_path": f"{HOME}/sd35/transformer"}
    (whole / "config.json").write_text(json.dumps(settings))
    card = write(run, tmp_path / "out")
    copied = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())
    assert copied == settings | {"_name_or_path": "transformer"}
    assert 'SD3Transformer2DModel.from_pretrained("me/lora", subfolder="transformer"' in card
    assert "transformer=transformer" in card and "load_lora_weights" not in card
    assert "lora" not in yaml.safe_load(card.split("---\n")[1])["tags"]
    card = write(run, tmp_path / "out", revision="v2")
    place = '"me/lora", revision="v2", subfolder="transformer", dtype=torch.float32'
    assert f"SD3Transformer2DModel.from_pretrained({place})" in card


def test_what_no_export_writes_is_not_published(run, tmp_path):
    """Nor what a link leads to. Mutation: copy the folders as they are."""
    (run / "lora" / "notes.txt").write_text("mine")
    elsewhere = tmp_path / "elsewhere.png"
    (run / "images" / "000002.png").rename(elsewhere)
    (run / "images" / "000002.png").symlink_to(elsewhere)
    write(run, tmp_path / "out")
    files = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files == {"README.md", "config.yaml", LORA}
    whole = run / "transformer"
    whole.mkdir()
    weights = whole / "diffusion_pytorch_model.safetensors"
    save_file({"x": torch.ones(2)}, weights)
    (whole / "config.json").write_text("{}")
    (whole / "notes.txt").write_text("mine")
    write(run, tmp_path / "whole")
    copied = {path.name for path in (tmp_path / "whole" / "transformer").iterdir()}
    assert copied == {"config.json", weights.name}
    weights.rename(tmp_path / "weights")
    weights.symlink_to(tmp_path / "weights")
    with pytest.raises(UserError, match="is a link, and only a run's own files are published"):
        write(run, tmp_path / "linked")
    assert not (tmp_path / "linked").exists()


def test_a_card_loads_the_branch_that_was_pushed(run, tmp_path):
    """Mutation: load the main branch, where another version may lie."""
    assert 'load_lora_weights("me/lora")' in write(run, tmp_path / "out")
    card = write(run, tmp_path / "out", revision="v2")
    assert 'load_lora_weights("me/lora", revision="v2")' in card
    # The base model's own is another.
    assert card.count("revision=") == 1


def test_the_command_writes_first_and_uploads_then(run, tmp_path, monkeypatch, capsys):
    """Mutation: upload in a dry run, or ask for the token last."""
    sent = []

    def upload(folder, repository, **options):
        sent.append((sorted(path.name for path in folder.rglob("*.*")), repository, options))
        return "https://hub/me/lora"

    monkeypatch.setattr(hub, "upload", upload)
    monkeypatch.setattr(hub, "get_token", lambda: None)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["push_run.py", str(run), "me/lora", *words])
        push.main()
        return capsys.readouterr().out

    text = call("--dry-run")
    assert sent == [] and "nothing was uploaded" in text
    assert "note: on held_out the headline is lower after training than before" in text
    assert (run / "hub" / "README.md").is_file()
    with pytest.raises(UserError, match="no token"):
        call()
    monkeypatch.setattr(hub, "get_token", lambda: "hf_mine")
    assert call("--private", "--revision", "v2").endswith("https://hub/me/lora\n")
    names = ["README.md", "before_and_after.png", "config.yaml", LORA]
    assert sent == [(names, "me/lora", {"is_private": True, "revision": "v2"})]
    call("--dry-run", "--revision", "v2")
    assert 'revision="v2"' in (run / "hub" / "README.md").read_text()
