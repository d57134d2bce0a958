"""A LoRA file says what it was trained on and how: in its metadata, by names that other programs
know, without paths or a time, and read back whoever wrote it.
"""

import json
import os
import re

import pytest
import yaml
from lightning import Trainer
from lora_weights import FORMATS, checkpoint_of, given
from runs import ROOT, composed, make
from safetensors import safe_open
from safetensors.torch import load_file

from flowrl.callbacks.checkpoint import Checkpoint
from flowrl.callbacks.record import RunRecord
from flowrl.callbacks.stop import Stop
from flowrl.cli import export
from flowrl.launch.compose import compose
from flowrl.runs import base_model
from flowrl.runs.base_model import named_here, named_in_run
from flowrl.runs.description import METHODS, address_of, base_model_of, method_of, reward_of
from flowrl.tuning.formats import read
from flowrl.tuning.layer_names import NAMES
from flowrl.tuning.metadata import ARCHITECTURES, day_of, modelspec, notes_of, stamp
from flowrl.tuning.writer import write

CONFIG = {
    "name": "my-run",
    "model": {"pretrained": "stabilityai/stable-diffusion-3.5-medium", "resolution": 512},
    "loss": {"_target_": "flowrl.losses.dppo.DPPO", "delta": 1e-6},
    "reward": {"_target_": "flowrl.rewards.ocr.OCR"},
    "lora": {"alpha": 8},
}
NOTES = {
    "flowrl.base_model": "stabilityai/stable-diffusion-3.5-medium",
    "flowrl.method": "Flow-DPPO",
    "flowrl.reward": "OCR",
    "flowrl.resolution": "512x512",
    "flowrl.name": "my-run",
}


def metadata(file):
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


def without_version(notes):
    version = notes["flowrl.version"]
    assert re.match(r"\d+\.|0\+", version)
    return {key: value for key, value in notes.items() if key != "flowrl.version"}


@pytest.mark.parametrize(
    ("resolution", "note"),
    [([384, 512], "512x384"), ([512, 512], "512x512"), ("wide", None), ([1, 2, 3], None)],
)
def test_notes_have_width_before_height(resolution, note):
    """As ModelSpec has them; a model of one's own may mean something else by the word. Mutation:
    swap them, or fail for what is no size.
    """
    model = CONFIG["model"] | {"resolution": resolution}
    assert notes_of(CONFIG | {"model": model}).get("flowrl.resolution") == note


def test_notes_say_the_run_and_no_path(tmp_path):
    """Mutation: publish where a base model lies on this machine."""
    assert without_version(notes_of(CONFIG)) == NOTES
    for folder in ("/home/me/models/sd35", "~/models/sd35/", r"C:\models\sd35", str(tmp_path)):
        notes = notes_of(named_here(CONFIG | {"model": {"pretrained": folder}}))
        assert notes["flowrl.base_model"] in ("sd35", tmp_path.name)
    assert notes_of(CONFIG | {"model": {"pretrained": "embedded:pipeline"}})[
        "flowrl.base_model"
    ] == ("embedded:pipeline")


def test_a_folder_here_is_no_hub_id(tmp_path, monkeypatch):
    """Mutation: take any ORG/NAME for the hub's."""
    monkeypatch.chdir(tmp_path)
    config = {"model": {"pretrained": "models/sd35"}, "seed": 1}
    assert base_model_of(named_here(config)) == "models/sd35"
    (tmp_path / "models" / "sd35").mkdir(parents=True)
    assert base_model_of(named_here(config)) == "sd35"
    assert named_here(config) == {"model": {"pretrained": "sd35"}, "seed": 1}


@pytest.mark.parametrize(
    ("record", "base"),
    [
        # As a launch writes it, and as one did before kinds were recorded.
        ({"value": "models/sd35", "digest": "0" * 64, "kind": "folder"}, "sd35"),
        ({"value": "models/sd35", "digest": "0" * 40, "kind": "hub"}, "models/sd35"),
        ({"value": "models/sd35", "digest": "0" * 64}, "sd35"),
        ({"value": "models/sd35", "digest": "0" * 40}, "models/sd35"),
        # The hub's cache did not know it yet; or the base was changed since.
        (None, "models/sd35"),
        ({"value": "models/sd3", "digest": "0" * 64, "kind": "folder"}, "models/sd35"),
    ],
)
def test_a_base_is_what_its_run_found(tmp_path, monkeypatch, record, base):
    """Whatever lies here now. Mutation: look at this folder."""
    config = {"model": {"pretrained": "models/sd35"}}
    inputs = {} if record is None else {"model.pretrained": record}
    (tmp_path / "provenance.json").write_text(json.dumps({"inputs": inputs}))
    assert base_model_of(named_in_run(config, tmp_path)) == base
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "sd35").mkdir(parents=True)
    assert base_model_of(named_in_run(config, tmp_path)) == base


@pytest.mark.parametrize("content", [None, "{}", "[1", '{"inputs": 1}'])
def test_a_base_without_a_record_is_no_repository(tmp_path, monkeypatch, content):
    """Unless the hub's cache knows it. Mutation: claim somebody's repository."""
    config = {"model": {"pretrained": "models/sd35", "revision": None}}
    if content is not None:
        (tmp_path / "provenance.json").write_text(content)
    assert base_model_of(named_in_run(config, tmp_path)) == "sd35"
    monkeypatch.setattr(base_model, "hub_commit", lambda text, revision: "0" * 40)
    assert base_model_of(named_in_run(config, tmp_path)) == "models/sd35"


@pytest.mark.parametrize("form", FORMATS)
def test_notes_go_through_every_format(form, tmp_path):
    """Of a file with notes and of one without. Mutation: lose them on reading, or on writing."""
    plain = write(given(), tmp_path / "plain", form, day="2026-01-02")
    assert read(plain).notes == {} and not any("spec" in key for key in metadata(plain))
    stamp(plain, notes_of(CONFIG))
    again = read(plain)
    assert without_version(again.notes) == NOTES and again.alpha == given().alpha
    copy = write(again, tmp_path / "copy", form, day="2026-01-02")
    assert read(copy).notes == again.notes
    told = {key for key in metadata(copy) if key.startswith("modelspec.")}
    assert bool(told) == (form == "comfy")
    assert load_file(copy).keys() == load_file(plain).keys()


def test_a_stamp_changes_nothing_else(tmp_path):
    """Equal content is an equal file. Mutation: drop the scale that diffusers keeps in the
    metadata, or keep the order in which the library happened to write it.
    """
    file = write(given(), tmp_path, "diffusers")
    before, tensors = metadata(file), load_file(file)
    mode = file.stat().st_mode
    stamp(file, NOTES)
    assert metadata(file) == before | NOTES and file.stat().st_mode == mode
    assert all((load_file(file)[name] == value).all() for name, value in tensors.items())
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    other = write(given(), tmp_path / "other", "diffusers")
    stamp(other, dict(reversed(NOTES.items())))
    assert other.read_bytes() == file.read_bytes()


def test_comfy_files_have_what_the_specification_asks_for(tmp_path):
    """Mutation: another spelling of a key, or an architecture that no reader lists."""
    fields = modelspec(NOTES, "2026-01-02")
    assert fields == {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v3.5-medium/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "my-run",
        "modelspec.description": "LoRA of stabilityai/stable-diffusion-3.5-medium, trained by "
        "Flow-DPPO, reward OCR, with FlowRL.",
        "modelspec.date": "2026-01-02",
        "modelspec.usage_hint": "No trigger words: prompt as with the base model, at strength 1.",
        "modelspec.resolution": "512x512",
    }
    own = modelspec({"flowrl.base_model": "embedded:pipeline"}, "2026-01-02")
    assert own["modelspec.architecture"] == "pipeline/lora"
    assert own["modelspec.title"] == "embedded:pipeline LoRA"


def test_every_base_model_on_the_hub_has_an_architecture():
    """But for models that are derived, for which other programs have no names.

    Mutation: add a model and forget its name for other programs.
    """
    bases = set()
    for path in (ROOT / "conf" / "model").glob("*.yaml"):
        needed = ["model.pretrained=any"] if path.stem == "derived" else []
        model = compose([f"model={path.stem}", "name=x", *needed]).model
        if not model["_target_"].endswith(".Derived"):
            bases.add(base_model_of({"model": model}))
    assert bases == ARCHITECTURES.keys() | {"embedded:pipeline"}


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["loss=dppo"], "Flow-DPPO"),
        (["loss=grpo", "sampler=flow_sde"], "Flow-GRPO"),
        (["loss=grpo", "sampler=dance_sde"], "DanceGRPO"),
        (["loss=cps", "sampler=cps"], "Flow-CPS"),
        (["loss=guard", "sampler=flow_sde"], "GRPO-Guard"),
        (["loss=tempflow", "sampler=flow_sde"], "TempFlow-GRPO's weight"),
        (["loss=nft", "sampler=ode"], "Diffusion-NFT"),
        (["loss=awm", "sampler=ode"], "Advantage Weighted Matching"),
        (["loss=pepg", "sampler=ode"], "PEPG"),
        (["loss=epg", "sampler=ode"], "EPG"),
        (["loss=par", "sampler=ode"], "PAR"),
        (["loss=forward_dppo", "sampler=ode"], "Forward DPPO"),
        (["loss=flow_dpo", "sampler=ode"], "Flow-DPO"),
        (["loss=dgpo", "sampler=ode"], "DGPO"),
        (["loss=draft", "sampler=ode"], "DRaFT"),
        (["loss=opd"], "DiffusionOPD"),
    ],
)
def test_every_loss_is_a_method_with_a_formula_and_a_paper(overrides, name):
    """Mutation: name the three methods of one loss alike."""
    method = method_of(composed(*overrides))
    assert method.name == name and method.formula and method.source
    has_no_paper = name in ("PEPG", "EPG", "PAR", "Forward DPPO")
    address = "" if has_no_paper else f"https://arxiv.org/abs/{method.source}"
    assert address_of(method) == address


def test_all_of_flowrls_losses_are_listed():
    """Mutation: add a loss and no method."""
    options = [path.stem for path in (ROOT / "conf" / "loss").glob("*.yaml")]
    targets = {composed(f"loss={option}").loss._target_ for option in options}
    assert targets == METHODS.keys()


def test_what_comes_from_outside_is_named_by_its_class():
    """Mutation: fail, or claim a paper."""
    method = method_of({"loss": {"_target_": "acme.losses.Mine"}})
    assert (method.name, method.formula, address_of(method)) == ("Mine", "", "")
    assert method_of({}).name == "unknown" and base_model_of({}) == "unknown"
    assert reward_of({}) == "unknown"


def test_a_mixture_is_its_terms():
    """Mutation: say no more than Mixture."""
    terms = {"a": {"_target_": "x.Clip"}, "b": {"_target_": "y.Text"}}
    node = {"_target_": "m.Mixture", "rewards": terms, "weights": {"a": 2.0, "b": 0.5}}
    assert reward_of({"reward": node}) == "Mixture: 2 x Clip (a) + 0.5 x Text (b)"


def test_a_checkpoints_notes_are_its_runs(tmp_path):
    """Mutation: export a checkpoint without a word of its run."""
    checkpoint_of(tmp_path, given())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (tmp_path / "provenance.json").write_text('{"inputs": {}}')
    assert without_version(read(tmp_path).notes) == NOTES


def test_the_command_writes_the_day_of_its_source_and_the_model_it_was_told(
    tmp_path, monkeypatch, capsys
):
    """The same twice. Mutation: today's date, or no base model for a stranger's file."""
    source = write(given(), tmp_path / "lora", "diffusers")
    os.utime(source, (1_700_000_000, 1_700_000_000))
    assert day_of(source) == "2023-11-14"
    monkeypatch.setattr(export.formats, "check", lambda *arguments: None)
    for out in ("a", "b"):
        words = [str(source), "model=flux1_dev", "--format", "comfy", "--out", str(tmp_path / out)]
        monkeypatch.setattr("sys.argv", ["export_lora.py", *words])
        export.main()
    capsys.readouterr()
    file = tmp_path / "a" / NAMES["comfy"]
    assert metadata(file)["modelspec.architecture"] == "flux-1-dev/lora"
    assert metadata(file)["modelspec.date"] == "2023-11-14"
    assert file.read_bytes() == (tmp_path / "b" / NAMES["comfy"]).read_bytes()


def test_a_runs_export_is_stamped_whatever_became_of_its_configuration(tmp_path, caplog):
    """Mutation: export without notes, or lose the LoRA for a damaged file."""
    policy, _, _ = make()
    record = RunRecord(folder=str(tmp_path))
    saver = Checkpoint(record=record, stop=Stop(), folder=str(tmp_path), every=1, keep=1)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    for text, method in ((yaml.safe_dump(CONFIG), "Flow-DPPO"), ("{", None)):
        (tmp_path / "config.yaml").write_text(text)
        saver.export(trainer, policy)
        assert read(tmp_path / "lora").notes.get("flowrl.method") == method
    assert "does not say what it was trained on" in caplog.text
