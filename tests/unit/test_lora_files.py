"""LoRA files in each format: what is written is read back, fits, and scales by alpha."""

import json
from typing import Any

import pytest
import torch
from lora_weights import FORMATS, LAYERS, given, mixed, network
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import FAMILIES

from flowrl.errors import UserError
from flowrl.tuning.formats import read
from flowrl.tuning.lora import attach_file
from flowrl.tuning.lora_file import LoRAFile
from flowrl.tuning.writer import lora_config, write


def run(transformer):
    torch.manual_seed(2)
    return transformer(
        hidden_states=torch.randn(1, 4, 16),
        encoder_hidden_states=torch.randn(1, 3, 32),
        pooled_projections=torch.randn(1, 16),
        timestep=torch.full((1,), 0.5),
        guidance=torch.full((1,), 3.5),
        img_ids=torch.zeros(4, 3),
        txt_ids=torch.zeros(3, 3),
        return_dict=False,
    )[0].detach()


def by_hand(weights):
    """The network with alpha / rank B A added to its own weights."""
    transformer = network()
    with torch.no_grad():
        for name in weights.a:
            scale = weights.alpha[name] / weights.a[name].shape[0]
            transformer.get_submodule(name).weight += scale * weights.b[name] @ weights.a[name]
    return run(transformer)


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_is_read_back_and_does_what_it_says(form, tmp_path):
    """Mutation: lose alpha on the way, swap A and B, or forget a prefix."""
    weights = given()
    file = write(weights, tmp_path / form, form)
    for source in (file, file.parent):
        again = read(source)
        assert again.alpha == weights.alpha
        assert all(torch.equal(again.a[name], weights.a[name]) for name in LAYERS)
        assert all(torch.equal(again.b[name], weights.b[name]) for name in LAYERS)
    transformer = network()
    base = run(transformer)
    adapter = attach_file(again, transformer, file)
    torch.testing.assert_close(run(transformer), by_hand(weights), rtol=1e-4, atol=1e-5)
    with adapter.at_reference():
        assert torch.equal(run(transformer), base)


def test_peft_and_diffusers_read_their_own_formats(tmp_path):
    """Mutation: write a configuration that peft completes with other defaults, or metadata that
    diffusers skips.
    """
    weights = given()
    write(weights, tmp_path / "peft", "peft")
    wrapped = PeftModel.from_pretrained(network(), tmp_path / "peft")
    torch.testing.assert_close(
        run(wrapped.base_model.model), by_hand(weights), rtol=1e-4, atol=1e-5
    )
    for form in ("diffusers", "comfy"):
        transformer = network()
        file = write(weights, tmp_path / form, form)
        stock = FAMILIES["flux1"].stock
        tensors, *rest = stock.lora_state_dict(file, return_alphas=True, return_lora_metadata=True)
        stock.load_lora_into_transformer(
            tensors, network_alphas=rest[0], transformer=transformer, metadata=rest[1]
        )
        torch.testing.assert_close(run(transformer), by_hand(weights), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMATS)
def test_layers_of_several_ranks_and_alphas(form, tmp_path):
    """Read back exactly, and by the stock loader of each format alike. Mutation: one rank or one
    alpha for all layers, or patterns that match another layer whose name ends alike.
    """
    weights = mixed()
    file = write(weights, tmp_path, form)
    assert read(file).alpha == weights.alpha and read(file).ranks == {LAYERS[0]: 4, LAYERS[1]: 2}
    transformer = network()
    if form == "peft":
        transformer = PeftModel.from_pretrained(transformer, tmp_path).base_model.model
    else:
        stock = FAMILIES["flux1"].stock
        tensors, alphas, settings = stock.lora_state_dict(
            file, return_alphas=True, return_lora_metadata=True
        )
        stock.load_lora_into_transformer(
            tensors, network_alphas=alphas, transformer=transformer, metadata=settings
        )
    torch.testing.assert_close(run(transformer), by_hand(weights), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "alphas"),
    [
        ({"alpha_pattern": {"attn.to_q": 8}}, (8, 12)),
        ({"alpha_pattern": {"^transformer_blocks.0.attn.to_q": 8, "to_v": 2.5}}, (8, 2.5)),
        ({"use_rslora": True}, (24, 24)),  # 12 / sqrt(4) is 24 / 4
        ({"use_rslora": True, "alpha_pattern": {"to_v": 3}}, (24, 6)),
    ],
)
def test_scales_that_pefts_configuration_tells(changes, alphas, tmp_path):
    """As peft itself scales them. Mutation: alpha over the rank whatever the configuration says."""
    write(given(), tmp_path, "peft")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    weights = read(tmp_path)
    assert tuple(weights.alpha[name] for name in LAYERS) == alphas
    wrapped = PeftModel.from_pretrained(network(), tmp_path)
    transformer = network()
    attach_file(weights, transformer, tmp_path)
    assert torch.equal(run(wrapped.base_model.model), run(transformer))


def test_what_diffusers_saves_of_a_transformer_alone(tmp_path):
    """The remedy for files under other names. Mutation: take its configuration's keys for other
    than they are.
    """
    transformer: Any = network()
    transformer.add_adapter(lora_config(mixed()), adapter_name="x")
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if ".lora_B.x" in name:
                parameter.fill_(0.5)
    transformer.save_lora_adapter(tmp_path, adapter_name="x")
    assert read(tmp_path).alpha == mixed().alpha
    assert all((value == 0.5).all() for value in read(tmp_path).b.values())


@pytest.mark.parametrize("form", ["diffusers", "peft"])
def test_a_layer_outside_the_blocks_is_that_layer_alone(form, tmp_path):
    """`proj_out` ends the name of a layer in every single block too. Mutation: give peft the
    ending.
    """
    weights = LoRAFile(
        {"proj_out": torch.randn(2, 32)}, {"proj_out": torch.randn(16, 2)}, {"proj_out": 2.0}
    )
    file = write(weights, tmp_path, form)
    transformer = network()
    attach_file(read(file), transformer, file)
    torch.testing.assert_close(run(transformer), by_hand(weights), rtol=1e-4, atol=1e-5)
    if form == "peft":
        wrapped = PeftModel.from_pretrained(network(), tmp_path).base_model.model
        assert {
            name.split(".lora_")[0] for name, _ in wrapped.named_parameters() if ".lora_" in name
        } == {"proj_out"}


def test_comfy_reads_alpha_from_a_tensor_per_layer(tmp_path):
    """Its loader takes alpha as the rank where there is none. Mutation: leave the tensors out."""
    tensors = load_file(write(given(), tmp_path, "comfy"))
    assert {key: float(value) for key, value in tensors.items() if key.endswith(".alpha")} == {
        f"transformer.{name}.alpha": 12.0 for name in LAYERS
    }


@pytest.mark.parametrize("prefix", ["text_encoder.", "text_encoder_2.", "text_encoders.clip_l."])
def test_a_text_encoders_part_is_passed_over_and_told(prefix, tmp_path):
    """As others publish them. Mutation: refuse the file, or leave the part out without a word."""
    file = write(given(), tmp_path, "diffusers")
    more = {f"{prefix}layers.0.q.lora_{part}.weight": torch.ones(4, 4) for part in "AB"}
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    save_file(load_file(file) | more, file, metadata)
    weights = read(file)
    assert weights.a.keys() == set(LAYERS) and weights.alpha == given().alpha
    assert weights.describe() == (
        "2 layers, rank 4, alpha 12; 2 tensors of text encoders are passed over, since those are "
        "not trained"
    )
    save_file(more, file)
    with pytest.raises(UserError, match="text encoders alone"):
        read(file)


def test_the_configuration_of_peft_is_plain_json(tmp_path):
    """Mutation: write sets or enums as their names."""
    write(given(), tmp_path, "peft")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (
        config["lora_alpha"] == 12
        and config["r"] == 4
        and config["target_modules"] == sorted(LAYERS)
    )
