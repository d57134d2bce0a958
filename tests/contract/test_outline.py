"""What is trained of a pipeline, made from its configurations before any weights are read."""

import json
import shutil

import diffusers
import pytest
from diffusers.models import modeling_utils
from families import FAMILIES
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from runs import composed, make

from flowrl.errors import UserError
from flowrl.launch.errors import explain
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


def model_of(folder, target="flowrl.models.derived.adapter.Derived"):
    """The part of a configuration that says what is loaded."""
    return {"_target_": target, "pretrained": str(folder)}


@pytest.mark.parametrize("name", SOME)
def test_it_has_the_names_and_shapes_of_what_is_loaded(name, folder_of):
    """And no numbers. Mutation: one of two networks, or names without their network's."""
    folder = folder_of(name)
    kind = getattr(diffusers, json.loads((folder / "model_index.json").read_text())["_class_name"])
    loaded = as_one(components_of(Source(kind, str(folder), None, "float32").load()))
    found = outline(model_of(folder))
    assert {key: value.shape for key, value in found.state_dict().items()} == {
        key: value.shape for key, value in loaded.state_dict().items()
    }
    assert all(weight.is_meta for weight in found.parameters())


@pytest.fixture
def never_loaded(monkeypatch):
    def load(*_, **__):
        pytest.fail("the model was loaded")

    monkeypatch.setattr(Source, "load", load)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("tuning=full", "^tuning=full trains one network, and the pipeline has 2; set tuning=lora"),
        ("tuning=full +model.quantization=nf4", "^tuning=full .* quantised ones cannot be trained"),
        ("trainer=fsdp", "^trainer=fsdp divides one network, and the pipeline has 2; take"),
        ("lora.targets=query", "^lora.targets=query names no linear layer of the model"),
        ("lora.rank=4000", "^lora.rank=4000 must be at most"),
        (
            "lora.compute=merged model.dtype=bfloat16",
            "^lora.compute=merged needs a base in float32",
        ),
    ],
)
@pytest.mark.usefixtures("never_loaded")
def test_what_does_not_suit_the_networks_is_refused_before_they_load(change, words, folder_of):
    """Mutation: ask the loaded model first, one in another dtype, or one of whole bits."""
    with pytest.raises(UserError, match=words):
        make(*settings_of("wan22", folder_of("wan22")), *change.split())


@pytest.mark.parametrize(("name", "key"), [("wan21", "num_layers"), ("sd3", "qk_norm")])
def test_what_does_not_come_about_without_weights_is_left_to_loading(
    name, key, folder_of, tmp_path
):
    """A damaged configuration, of a listed class and of another, and a class that is none of
    diffusers' networks. Mutation: an error of its own.
    """
    folder = tmp_path / "copy"
    shutil.copytree(folder_of(name), folder)
    config = folder / "transformer" / "config.json"
    whole = json.loads(config.read_text())
    for damaged in ("{", "[]", json.dumps(whole | {key: "nonsense"})):
        config.write_text(damaged)
        assert outline(model_of(folder)) is None, damaged
    config.write_text(json.dumps(whole | {"_class_name": "WanTransformer3DModel"}))
    index = json.loads((folder / "model_index.json").read_text())
    for entry in (
        ["mine", "WanTransformer3DModel"],
        ["diffusers", "Unknown"],
        ["diffusers", "utils"],
        ["diffusers", "WanPipeline"],
        [None, None],
    ):
        changed = index | {"transformer": entry}
        (folder / "model_index.json").write_text(json.dumps(changed))
        assert outline(model_of(folder)) is None, entry


def test_a_damaged_configuration_is_one_line_that_names_it(folder_of, tmp_path):
    """Mutation: let the outline fail first."""
    folder = tmp_path / "copy"
    shutil.copytree(folder_of("wan21"), folder)
    (folder / "transformer" / "config.json").write_text("[]")
    with pytest.raises((UserError, InstantiationException)) as error:
        make(*settings_of("wan21", folder))
    line = explain(error.value)
    assert "transformer" in line and "\n" not in line


def test_a_pipeline_of_another_family_is_left_to_loading(folder_of):
    """Mutation: compare the LoRA with the layers of the wrong family first."""
    flux = "flowrl.models.flux1.Flux1"
    assert outline(model_of(folder_of("sd3"), flux)) is None
    assert outline(model_of(folder_of("sd3"), "flowrl.models.sd3.SD3")) is not None


def test_nothing_is_said_of_a_model_that_suits(folder_of, monkeypatch):
    """diffusers warns of every cast. Mutation: cast by its own method."""
    said = []
    monkeypatch.setattr(modeling_utils.logger, "warning", lambda *words: said.append(words))
    cfg = composed(*settings_of("sd3", folder_of("sd3")), "model.dtype=bfloat16")
    check_networks(cfg, instantiate(cfg.tuning))
    assert not said


@pytest.mark.parametrize(
    "model",
    [
        {"_target_": "acme.Model", "pretrained": "acme/net"},
        {"_target_": "acme.Model", "pretrained": "/no/folder"},
        {"_target_": "flowrl.models.sd3.SD3", "pretrained": "meta:stabilityai/none"},
        {"_target_": "flowrl.models.sd3.SD3"},
    ],
)
def test_what_is_no_pipeline_is_not_looked_for(model):
    """In another package `pretrained` may mean anything. Mutation: look for a folder or a hub
    id.
    """
    assert outline(model) is None
