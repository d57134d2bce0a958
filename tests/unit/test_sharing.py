"""What is published of a run: its weights, and nothing of the machine that it ran on."""

import copy
import json
import sys

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from shared_run import HOME, LORA, edit, write

from flowrl.cli import push
from flowrl.errors import UserError
from flowrl.sharing import hub
from flowrl.sharing.folder import examine
from flowrl.sharing.privacy import clean, published


def test_nothing_of_the_machine_is_published(finished_run, tmp_path):
    """Mutation: copy config.yaml as it is."""
    out = tmp_path / "out"
    write(finished_run, out)
    for path in out.rglob("*.*"):
        for secret in (str(HOME), str(finished_run), str(tmp_path), "acme", "abc", "8000"):
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


def test_a_place_that_slips_through_stops_it(finished_run, tmp_path):
    """Nothing is left behind. Mutation: publish all the same."""
    path = finished_run / "config.yaml"
    config = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(config | {f"{finished_run.resolve()}": 1}))
    with pytest.raises(UserError, match=r"holds .*my run, a place on this machine"):
        write(finished_run, tmp_path / "out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["my run"]


def test_what_cannot_be_shared_is_refused(finished_run, tmp_path):
    """Mutation: publish a run that was stopped, or a LoRA that does nothing."""
    with pytest.raises(UserError, match=r"no config.yaml there; give the folder of a finished run"):
        examine(tmp_path, None)
    with pytest.raises(UserError, match=r"nowhere: no such folder; give the folder of a finished"):
        examine(tmp_path / "nowhere", None)
    summary = finished_run / "summary.json"
    edit(summary, status="stopped")
    with pytest.raises(UserError, match=r"status is 'stopped'.*continue it with: .*resume="):
        examine(finished_run, None)
    edit(summary, status="finished")
    file = finished_run / "lora" / LORA
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    zeros = {key: value * ("lora_B" not in key) for key, value in tensors.items()}
    save_file(zeros, file, metadata)
    with pytest.raises(UserError, match="all of its B are zero"):
        examine(finished_run, None)
    first = next(iter(tensors))
    save_file(tensors | {first: tensors[first] * torch.nan}, file, metadata)
    with pytest.raises(UserError, match="not finite numbers"):
        examine(finished_run, None)
    file.unlink()
    (finished_run / "lora").rmdir()
    with pytest.raises(UserError, match="no weights to share"):
        examine(finished_run, None)
    summary.unlink()
    with pytest.raises(UserError, match="status is 'unfinished'"):
        examine(finished_run, None)


def test_another_folder_is_not_overwritten(finished_run, tmp_path):
    """An earlier version of the same is, not a project that has a README.md too. Mutation: delete
    what lies there.
    """
    out = tmp_path / "out"
    write(finished_run, out)
    card = write(finished_run, out)
    (out / "src").mkdir()
    (out / "src" / "mine.py").touch()
    with pytest.raises(UserError, match=r"something else, such as src/mine\.py; give a new"):
        write(finished_run, out)
    assert (out / "src" / "mine.py").exists() and (out / "README.md").read_text() == card
    assert not out.with_name("out.partial").exists()


def test_a_whole_transformer_is_copied_without_its_place(finished_run, tmp_path, awake_policy):
    """Mutation: publish where its base model lies."""
    whole = finished_run / "transformer"
    whole.mkdir()
    save_file({"x": torch.ones(2)}, whole / "diffusion_pytorch_model.safetensors")
    settings = {"_class_name": "SD3Transformer2DModel", "_name_or_path": f"{HOME}/sd35/transformer"}
    (whole / "config.json").write_text(json.dumps(settings))
    card = write(finished_run, tmp_path / "out")
    copied = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())
    assert copied == settings | {"_name_or_path": "transformer"}
    assert 'SD3Transformer2DModel.from_pretrained("me/lora", subfolder="transformer"' in card
    assert "transformer=transformer" in card and "load_lora_weights" not in card
    assert "lora" not in yaml.safe_load(card.split("---\n")[1])["tags"]
    card = write(finished_run, tmp_path / "out", revision="v2")
    place = '"me/lora", revision="v2", subfolder="transformer", dtype=torch.float32'
    assert f"SD3Transformer2DModel.from_pretrained({place})" in card


def test_what_no_export_writes_is_not_published(finished_run, tmp_path):
    """Nor what a link leads to. Mutation: copy the folders as they are."""
    (finished_run / "lora" / "notes.txt").write_text("mine")
    elsewhere = tmp_path / "elsewhere.png"
    (finished_run / "images" / "000002.png").rename(elsewhere)
    (finished_run / "images" / "000002.png").symlink_to(elsewhere)
    write(finished_run, tmp_path / "out")
    files = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files == {"README.md", "config.yaml", LORA}
    whole = finished_run / "transformer"
    whole.mkdir()
    weights = whole / "diffusion_pytorch_model.safetensors"
    save_file({"x": torch.ones(2)}, weights)
    (whole / "config.json").write_text("{}")
    (whole / "notes.txt").write_text("mine")
    write(finished_run, tmp_path / "whole")
    copied = {path.name for path in (tmp_path / "whole" / "transformer").iterdir()}
    assert copied == {"config.json", weights.name}
    weights.rename(tmp_path / "weights")
    weights.symlink_to(tmp_path / "weights")
    with pytest.raises(UserError, match="is a link, and only a run's own files are published"):
        write(finished_run, tmp_path / "linked")
    assert not (tmp_path / "linked").exists()


def test_the_command_writes_first_and_uploads_then(finished_run, tmp_path, monkeypatch, capsys):
    """Mutation: upload in a dry run, or ask for the token last."""
    sent = []

    def upload(folder, repository, **options):
        sent.append((sorted(path.name for path in folder.rglob("*.*")), repository, options))
        return "https://hub/me/lora"

    monkeypatch.setattr(hub, "upload", upload)
    monkeypatch.setattr(hub, "get_token", lambda: None)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["push_run.py", str(finished_run), "me/lora", *words])
        push.main()
        return capsys.readouterr().out

    text = call("--dry-run")
    assert sent == [] and "nothing was uploaded" in text
    assert "note: on held_out the headline is lower after training than before" in text
    assert (finished_run / "hub" / "README.md").is_file()
    with pytest.raises(UserError, match="no token"):
        call()
    monkeypatch.setattr(hub, "get_token", lambda: "hf_mine")
    assert call("--private", "--revision", "v2").endswith("https://hub/me/lora\n")
    names = ["README.md", "before_and_after.png", "config.yaml", LORA]
    assert sent == [(names, "me/lora", {"is_private": True, "revision": "v2"})]
    call("--dry-run", "--revision", "v2")
    assert 'revision="v2"' in (finished_run / "hub" / "README.md").read_text()
