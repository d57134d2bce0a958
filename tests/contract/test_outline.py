"""What is trained of a pipeline, made from its configurations before any weights are read."""

import json
import shutil

import diffusers
import pytest
from diffusers.models import modeling_utils
from families import FAMILIES
from hydra.utils import instantiate
from runs import composed, make

from flowrl.errors import UserError
from flowrl.launch.networks import check_networks
from flowrl.models.experts import as_one, components_of
from flowrl.models.loading import Source
from flowrl.models.outline import outline

SOME = ("sd3", "z_image", "wan21", "wan22")
"""A listed class, one of images, one of clips, and a pipeline of two networks."""


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    place = tmp_path_factory.mktemp("outlines")

    def save(name):
        folder = place / name
        return folder if folder.is_dir() else FAMILIES[name].save(folder)

    return save


def settings_of(name, folder):
    """A derived run on a family's pipeline."""
    call = {key: value for key, value in FAMILIES[name].call.items() if "guidance" not in key}
    inner = ", ".join(f"{key}: {value}" for key, value in call.items())
    options = ("model=derived", f"model.pretrained={folder}", f"model.call={{{inner}}}")
    options += ("model.dtype=float32", "lora.rank=4", "lora.targets=auto", "num_threads=1")
    return (*options, "reward=jpeg_compressibility", "embeddings.folder=null")


@pytest.mark.parametrize("name", SOME)
def test_it_has_the_names_and_shapes_of_what_is_loaded(name, folder_of):
    """And no numbers. Mutation: one of two networks, or names without their network's."""
    folder = folder_of(name)
    kind = getattr(diffusers, json.loads((folder / "model_index.json").read_text())["_class_name"])
    loaded = as_one(components_of(Source(kind, str(folder), None, "float32").load()))
    found = outline(str(folder), None)
    assert {key: value.shape for key, value in found.state_dict().items()} == {
        key: value.shape for key, value in loaded.state_dict().items()
    }
    assert all(weight.is_meta for weight in found.parameters())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("tuning=full", "^tuning=full trains one network, and the pipeline has 2; set tuning=lora"),
        ("trainer=fsdp", "^trainer=fsdp divides one network, and the pipeline has 2; take"),
        ("lora.targets=query", "^lora.targets=query names no linear layer of the model"),
        ("lora.rank=4000", "^lora.rank=4000 must be at most"),
        (
            "lora.compute=merged model.dtype=bfloat16",
            "^lora.compute=merged needs a base in float32",
        ),
    ],
)
def test_what_does_not_suit_the_networks_is_refused_before_they_load(
    change, words, folder_of, monkeypatch
):
    """Mutation: ask the loaded model first, or one in another dtype."""

    def load(*_, **__):
        pytest.fail("the model was loaded")

    monkeypatch.setattr(Source, "load", load)
    with pytest.raises(UserError, match=words):
        make(*settings_of("wan22", folder_of("wan22")), *change.split())


def test_what_does_not_come_about_without_weights_is_left_to_loading(folder_of, tmp_path):
    """A class of another library, and a network whose configuration is gone. Mutation: an error."""
    folder = tmp_path / "copy"
    shutil.copytree(folder_of("wan21"), folder)
    config = folder / "transformer" / "config.json"
    whole = config.read_text()
    config.write_text("{")
    assert outline(str(folder), None) is None
    config.write_text(whole)
    index = json.loads((folder / "model_index.json").read_text())
    for entry in (["mine", "WanTransformer3DModel"], ["diffusers", "Unknown"], [None, None]):
        changed = index | {"transformer": entry}
        (folder / "model_index.json").write_text(json.dumps(changed))
        assert outline(str(folder), None) is None


def test_nothing_is_said_of_a_model_that_suits(folder_of, monkeypatch):
    """diffusers warns of every cast. Mutation: cast by its own method."""
    said = []
    monkeypatch.setattr(modeling_utils.logger, "warning", lambda *words: said.append(words))
    cfg = composed(*settings_of("sd3", folder_of("sd3")), "model.dtype=bfloat16")
    check_networks(cfg, instantiate(cfg.tuning))
    assert not said


def test_a_model_of_another_package_is_not_looked_for(folder_of, monkeypatch):
    """Its `pretrained` may mean anything. Mutation: look for a folder or a hub id."""
    cfg = composed("model.pretrained=/of/its/own")
    cfg.model._target_ = "acme.Model"
    check_networks(cfg, None)
