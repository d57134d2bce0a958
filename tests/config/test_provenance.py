"""What a run records of its inputs, code and changes, and compares where it is resumed."""

import json
import os

import pytest
from omegaconf import DictConfig, OmegaConf

from flowrl.errors import UserError
from flowrl.launch.changes import Provenance
from flowrl.launch.start import refuse_other_start
from flowrl.runs import provenance
from flowrl.runs.base_model import named_in_run
from flowrl.runs.changes import Change, read_changes
from flowrl.runs.files import PROVENANCE
from flowrl.types import Prompt


def test_what_was_changed_on_the_way_is_kept(tmp_path, capsys):
    """Over several resumptions; what was changed where nothing was done since counts once, and back
    again not at all.

    Mutation: tell of it and forget it, or keep the last change alone.
    """
    steps = [
        (Change("seed", "0", "7"), 0, []),
        (Change("seed", "7", "5"), 2, ["seed 7 -> 5 after 2"]),
        (Change("lr", "1", "2"), 3, ["seed 7 -> 5 after 2", "lr 1 -> 2 after 3"]),
        (Change("lr", "2", "3"), 3, ["seed 7 -> 5 after 2", "lr 1 -> 3 after 3"]),
        (Change("lr", "3", "1"), 3, ["seed 7 -> 5 after 2"]),
        (Change("seed", "5", "6"), 1, ["seed 7 -> 6 after 1"]),
    ]
    for change, iteration, expected in steps:
        record = examined(tmp_path, "a", path="p.txt")
        record.tell_changes([change], iteration)
        record.write()
        written = json.loads((tmp_path / PROVENANCE).read_text())
        kept = read_changes(written, tmp_path / PROVENANCE)
        assert [f"{item} after {item.iteration}" for item in kept] == expected
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "seed 0 -> 7: no iteration is done yet, so the run has the new value throughout"
    )
    assert lines[1].startswith("seed 7 -> 5: from here on the numbers are not those of")
    with pytest.raises(UserError, match=r"provenance\.json is damaged"):
        read_changes({"changes": [{"key": "seed"}]}, tmp_path / PROVENANCE)


def examined(folder, *texts, path, overrides=(), **keys):
    cfg = OmegaConf.create(
        {
            "data": {"prompts": {"_target_": "x", "path": path}},
            "evaluation": {
                "sets": {"held_in": {"path": "${data.prompts.path}"}},
                "max_prompts": None,
            },
            **keys,
        }
    )
    assert isinstance(cfg, DictConfig)
    result = Provenance(cfg, folder, overrides)
    result.check_paths()
    prompts = [Prompt(text) for text in texts]
    result.check_prompts(prompts, {"held_in": prompts})
    return result


def test_prompts_that_changed_are_refused_until_taken_as_they_are(tmp_path):
    """Another file is a change on purpose; a BOM, which changes no prompt, is none; a run without a
    record is taken.

    Mutation: compare the first prompts only, leave metadata out, or refuse what the user has asked
    for.
    """
    examined(tmp_path, "a", "b", path="p.txt").write()
    examined(tmp_path, "a", "b", path="p.txt")
    expected = r"data.prompts \(p.txt\): its 2 prompts changed .* \+\+data.prompts.path=p.txt"
    with pytest.raises(UserError, match=expected):
        examined(tmp_path, "a", "c", path="p.txt", overrides=["data.prompts.path=p.txt"])
    examined(tmp_path, "a", "c", path="q.txt")
    examined(tmp_path, "a", "c", path="p.txt", overrides=["++data.prompts.path=p.txt"]).write()
    examined(tmp_path, "a", "c", path="p.txt")
    first, second = (provenance.prompts_digest([Prompt("a", "", {"n": n})]) for n in (1, 2))
    assert first != second
    (tmp_path / PROVENANCE).write_text('{"git_revision": null}')
    examined(tmp_path, "d", path="p.txt")
    (tmp_path / PROVENANCE).write_text("[]")
    with pytest.raises(UserError, match=r"provenance.json is damaged \(a JSON object.*delete it"):
        examined(tmp_path, "d", path="p.txt")


@pytest.mark.parametrize(
    "key", ["reward.weights", "model.pretrained", "reward.rewards.first.file", "lora.start"]
)
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_any_key_that_names_a_path_is_an_input(key, kind, tmp_path, monkeypatch):
    """Mutation: list the loaders by hand, or compare names without contents."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    place = tmp_path / "weights"
    if kind == "folder":
        place.mkdir()
        place /= "model.safetensors"
    place.write_bytes(b"one")
    node = OmegaConf.to_container(OmegaConf.from_dotlist([f"{key}=weights"]))
    examined(run, "a", path="p.txt", **node).write()
    examined(run, "a", path="p.txt", **node)
    place.write_bytes(b"two")
    with pytest.raises(
        UserError, match=rf"^{key}=weights changed since the run began.*: \+\+{key}=weights$"
    ):
        examined(run, "a", path="p.txt", **node)
    examined(run, "a", path="p.txt", overrides=[f"++{key}=weights"], **node)


def test_a_runs_copy_of_its_lora_stands_for_the_original(tmp_path, monkeypatch):
    """The original may change or go. Mutation: compare it for ever, or refuse the remedy that the
    refusal names.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").write_bytes(b"one")
    node = {"lora": {"start": "weights"}}
    examined(tmp_path, "a", path="p.txt", **node).write()
    (tmp_path / "weights").write_bytes(b"two")
    with pytest.raises(UserError, match=r"lora\.start=weights changed"):
        examined(tmp_path, "a", path="p.txt", **node)
    refuse_other_start(["++lora.start=weights"], str(tmp_path / "weights"))
    with pytest.raises(UserError, match="keeps the LoRA that it began from"):
        refuse_other_start(["lora.start=other"], str(tmp_path / "weights"))
    (tmp_path / "start").mkdir()
    examined(tmp_path, "a", path="p.txt", **node)


def test_accepted_prompts_are_told(tmp_path, capsys):
    """Those to train on, and the evaluation set that refers to their path. Mutation: accept without
    a word.
    """
    examined(tmp_path, "a", path="p.txt").write()
    examined(tmp_path, "b", path="p.txt", overrides=["++data.prompts.path=p.txt"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "data.prompts (p.txt)",
        "evaluation.sets.held_in (p.txt)",
    ]
    assert all(line.endswith("taken as it is, as ++data.prompts.path says") for line in lines)


@pytest.mark.parametrize(
    "key", ["evaluation.batch_size", "data.seed", "evaluation.sets.other.path"]
)
def test_prompts_are_accepted_by_their_own_keys_alone(key, tmp_path):
    """Mutation: take any key below data or evaluation for one of prompts."""
    examined(tmp_path, "a", path="p.txt").write()
    with pytest.raises(UserError, match="prompt changed since the run began"):
        examined(tmp_path, "b", path="p.txt", overrides=[f"++{key}=4"])


def test_a_large_file_is_known_by_its_content(tmp_path, monkeypatch):
    """Touched and copied it is the same; with other bytes in its header, its body or its size it is
    not.

    Mutation: compare times of change, sizes alone, or the first block alone.
    """
    monkeypatch.setattr(provenance, "READ_WHOLE", 100)
    monkeypatch.setattr(provenance, "SAMPLE_SIZE", 8)
    path = tmp_path / "model.safetensors"
    content = (40).to_bytes(8, "little") + bytes(4000)
    path.write_bytes(content)
    before = provenance.path_digest("model.pretrained", str(path))
    os.utime(path, (1, 1))
    assert provenance.path_digest("model.pretrained", str(path)) == before
    others = [content + b"0", content[:-1] + b"1", content[:2000] + b"1" * 100 + content[2100:]]
    for other in (*others, content[:45] + b"1" + content[46:]):
        path.write_bytes(other)
        assert provenance.path_digest("model.pretrained", str(path)) != before


def test_digests_of_an_earlier_version_are_not_compared(tmp_path):
    """They went by times of change. Mutation: refuse a run of that version."""
    (tmp_path / "weights").write_bytes(b"one")
    node = {"reward": {"weights": str(tmp_path / "weights")}}
    examined(tmp_path, "a", path="p.txt", **node).write()
    record = json.loads((tmp_path / PROVENANCE).read_text())
    del record["digests"]
    (tmp_path / PROVENANCE).write_text(json.dumps(record))
    (tmp_path / "weights").write_bytes(b"two")
    examined(tmp_path, "a", path="p.txt", **node)
    with pytest.raises(UserError, match="its 1 prompt changed"):
        examined(tmp_path, "b", path="p.txt", **node)


def test_a_word_or_an_output_is_no_input(tmp_path, monkeypatch):
    """A folder `train` beside the run, and where a logger writes. Mutation: take every word that
    exists for a path.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "file").write_text("one")
    node = {
        "loss": {"split": "train"},
        "logger": {"csv": {"save_dir": str(tmp_path), "path": "train"}},
    }
    assert set(examined(tmp_path, "a", path="p.txt", **node).inputs) == {
        "data.prompts",
        "evaluation.sets.held_in",
    }


def test_a_run_records_what_its_paths_are(tmp_path, monkeypatch):
    """So that a folder is known for one elsewhere. Mutation: keep the digest alone."""
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "weights").touch()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(provenance, "hub_commit", lambda *_: "abc")
    node = {
        "model": {"pretrained": "models/mine"},
        "reward": {"weights": "weights", "processor": "org/name"},
    }
    monkeypatch.chdir(tmp_path)
    examined(tmp_path, "a", path="p.txt", **node).write()
    monkeypatch.chdir("elsewhere")
    inputs = json.loads((tmp_path / PROVENANCE).read_text())["inputs"]
    kinds = {key: entry["kind"] for key, entry in inputs.items() if "kind" in entry}
    assert kinds == {
        "model.pretrained": "folder",
        "reward.weights": "file",
        "reward.processor": "hub",
    }
    assert named_in_run(node, tmp_path)["model"] == {"pretrained": "mine"}


def test_a_hub_repository_is_known_by_its_commit(tmp_path, monkeypatch):
    """Without asking the hub. Mutation: take the name for the content, or another revision's
    commit.
    """
    monkeypatch.setattr(provenance, "HF_HUB_CACHE", str(tmp_path))
    refs = tmp_path / "models--org--name" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("abc")
    (refs / "v2").write_text("def")
    assert provenance.path_digest("model.pretrained", "org/name") == "abc"
    assert provenance.path_digest("reward.weights", "org/name/file.pt") == "abc"
    assert provenance.path_digest("model.pretrained", "org/name", "v2") == "def"
    assert provenance.path_digest("model.pretrained", "org/other") is None
    assert provenance.path_digest("judge.model", "org/name") is None


def test_other_code_is_told_once(tmp_path, monkeypatch, capsys):
    """What was, what is; a run of an earlier version has it in its summary. Mutation: tell it at
    every resumption.
    """
    then = {
        "git_revision": "1" * 40,
        "versions": provenance.environment()["versions"] | {"torch": "1.0"},
    }
    del then["versions"]["flowrl"]  # as an earlier version wrote it
    (tmp_path / "summary.json").write_text(json.dumps(then))
    now = then | {
        "git_revision": "2" * 40 + "+",
        "versions": then["versions"] | {"torch": "3.0", "flowrl": "2"},
        "projects": {"acme": "3" * 40},
    }
    monkeypatch.setattr(provenance, "environment", lambda: now)
    first = examined(tmp_path, "a", path="p.txt")
    first.tell_changes([], 1)
    first.write()
    assert capsys.readouterr().out.startswith(
        "commit 1111111111 -> 2222222222+, torch 1.0 -> 3.0: the run goes on with"
    )
    examined(tmp_path, "a", path="p.txt").tell_changes([], 1)
    assert capsys.readouterr().out == ""
