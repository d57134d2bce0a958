"""LoRA files in each format: what is written is read back, fits the right transformer only, and scales by alpha."""

import json

import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import FAMILIES

from flowrl.models import lora
from flowrl.models.lora_files import LoRAFile, attach, check, read, write

FORMATS = ("diffusers", "peft", "comfy")
LAYERS = ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.attn.to_v")


def network():
    torch.manual_seed(0)
    return FluxTransformer2DModel(**FAMILIES["flux1"].transformer).eval()


def given(layers=LAYERS, rank=4, alpha=12.0, width=32):
    torch.manual_seed(1)
    return LoRAFile(
        {name: torch.randn(rank, width) for name in layers},
        {name: torch.randn(width, rank) for name in layers},
        dict.fromkeys(layers, alpha),
    )


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
    attach(again, transformer, file)
    torch.testing.assert_close(run(transformer), by_hand(weights), rtol=1e-4, atol=1e-5)
    with lora.disabled(transformer):
        assert torch.equal(run(transformer), base)


def test_peft_and_diffusers_read_their_own_formats(tmp_path):
    """Mutation: write a configuration that peft completes with other defaults, or metadata that diffusers skips."""
    weights = given()
    write(weights, tmp_path / "peft", "peft")
    wrapped = PeftModel.from_pretrained(network(), tmp_path / "peft")
    torch.testing.assert_close(run(wrapped.base_model.model), by_hand(weights), rtol=1e-4, atol=1e-5)
    for form in ("diffusers", "comfy"):
        transformer = network()
        file = write(weights, tmp_path / form, form)
        stock = FAMILIES["flux1"].stock
        tensors, *rest = stock.lora_state_dict(file, return_alphas=True, return_lora_metadata=True)
        stock.load_lora_into_transformer(tensors, network_alphas=rest[0], transformer=transformer, metadata=rest[1])
        torch.testing.assert_close(run(transformer), by_hand(weights), rtol=1e-4, atol=1e-5)


def test_a_checkpoints_weights_do_not_pass_for_a_file(tmp_path):
    """Its keys name the adapter, and alpha stands elsewhere. Mutation: take the rank for alpha."""
    weights = given()
    tensors = {f"{name}.lora_A.policy.weight": value for name, value in weights.a.items()}
    tensors |= {f"{name}.lora_B.policy.weight": value for name, value in weights.b.items()}
    save_file(tensors, tmp_path / "ema.safetensors")
    with pytest.raises(ValueError, match=r"does not tell its alpha.*export_lora.py"):
        read(tmp_path / "ema.safetensors")
    assert read(tmp_path / "ema.safetensors", alpha=8.0).alpha == dict.fromkeys(LAYERS, 8.0)


@pytest.mark.parametrize(("key", "value"), [("use_rslora", True), ("alpha_pattern", {"to_q": 8})])
def test_other_ways_of_scaling_are_refused(key, value, tmp_path):
    """Mutation: read alpha over the rank whatever the configuration says."""
    write(given(), tmp_path, "peft")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=key):
        read(tmp_path)


@pytest.mark.parametrize("form", ["diffusers", "peft"])
def test_a_layer_outside_the_blocks_is_that_layer_alone(form, tmp_path):
    """`proj_out` ends the name of a layer in every single block too. Mutation: give peft the ending."""
    weights = LoRAFile({"proj_out": torch.randn(2, 32)}, {"proj_out": torch.randn(16, 2)}, {"proj_out": 2.0})
    file = write(weights, tmp_path, form)
    transformer = network()
    attach(read(file), transformer, file)
    torch.testing.assert_close(run(transformer), by_hand(weights), rtol=1e-4, atol=1e-5)
    if form == "peft":
        wrapped = PeftModel.from_pretrained(network(), tmp_path).base_model.model
        assert {name.split(".lora_")[0] for name, _ in wrapped.named_parameters() if ".lora_" in name} == {"proj_out"}


def test_comfy_reads_alpha_from_a_tensor_per_layer(tmp_path):
    """Its loader takes alpha as the rank where there is none. Mutation: leave the tensors out."""
    tensors = load_file(write(given(), tmp_path, "comfy"))
    assert {key: float(value) for key, value in tensors.items() if key.endswith(".alpha")} == {
        f"transformer.{name}.alpha": 12.0 for name in LAYERS
    }


@pytest.mark.parametrize(
    ("layers", "width", "words"),
    [
        (("blocks.0.attn.q",), 32, "none of its 1 layers"),
        ((*LAYERS, "transformer_blocks.7.attn.to_q"), 32, "only 2 of its 3 layers"),
        (LAYERS, 48, "none of its 2 layers"),
    ],
)
def test_another_architectures_lora_is_refused(layers, width, words, tmp_path):
    """Mutation: skip layers that are not there, or look at names alone."""
    with pytest.raises(ValueError, match=f"{words} fit this FluxTransformer2DModel.*another architecture"):
        check(given(layers, width=width), network(), tmp_path)


@pytest.mark.parametrize(
    ("layers", "width", "words"),
    [
        (("blocks.0.attn.q",), 32, "does not fit this model|another architecture"),
        ((*LAYERS, "transformer_blocks.7.attn.to_q"), 32, "4 of the LoRA's 6 weights fit"),
        (LAYERS, 48, "does not fit this model"),
    ],
)
def test_another_architectures_lora_does_not_replace_the_policys(layers, width, words, tmp_path):
    """As evaluations load it. Mutation: go on where diffusers leaves layers out, or draws with the base alone."""
    transformer = network()
    lora.LoRA(rank=4, alpha=4, targets=["to_q"], init="gaussian").attach(transformer, seed=0)
    write(given(layers, width=width), tmp_path, "diffusers")
    with pytest.raises(ValueError, match=words):
        lora.load_folder(transformer, tmp_path)


def test_a_text_encoders_part_of_a_lora_is_left_alone(tmp_path):
    """As others publish them. Mutation: count it with the transformer's, and refuse the file."""
    transformer = network()
    lora.LoRA(rank=4, alpha=4, targets=["to_q"], init="gaussian").attach(transformer, seed=0)
    file = write(given(), tmp_path, "diffusers")
    save_file(load_file(file) | {"text_encoder.q.lora_A.weight": torch.ones(4, 8)}, file, {"format": "pt"})
    lora.load_folder(transformer, tmp_path)
    assert {tuple(weight.shape) for weight in lora.parameters(transformer).values()} == {(4, 32), (32, 4)}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "no LoRA weights"),
        ({"transformer.x.lora_A.weight": torch.ones(2, 2)}, "x has only one of its two matrices"),
        ({"decoder.weight": torch.ones(2, 2)}, "'decoder.weight' is no LoRA weight"),
    ],
)
def test_files_without_loras_are_refused(tensors, words, tmp_path):
    """Mutation: return an adapter without layers."""
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=words):
        read(tmp_path / "x.safetensors")


def test_missing_and_damaged_files_are_named(tmp_path):
    """Mutation: let safetensors' error through."""
    with pytest.raises(ValueError, match="no such file"):
        read(tmp_path / "none")
    with pytest.raises(ValueError, match="0 LoRA files in this folder"):
        read(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"12345678901")
    with pytest.raises(ValueError, match=r"x\.safetensors is damaged"):
        read(tmp_path)


def test_the_configuration_of_peft_is_plain_json(tmp_path):
    """Mutation: write sets or enums as their names."""
    write(given(), tmp_path, "peft")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["lora_alpha"] == 12 and config["r"] == 4 and config["target_modules"] == sorted(LAYERS)
    with pytest.raises(ValueError, match="several ranks"):
        mixed = LoRAFile({**given().a, "x": torch.ones(8, 4)}, {**given().b, "x": torch.ones(4, 8)}, given().alpha)
        write(mixed, tmp_path, "peft")
