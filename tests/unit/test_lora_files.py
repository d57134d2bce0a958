"""LoRA files in each format: what is written is read back, fits the right transformer only, and
scales by alpha.
"""

import json
import re
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import FAMILIES

from flowrl.errors import UserError
from flowrl.evaluation.subjects import Subject
from flowrl.runs import checkpoint
from flowrl.tuning.formats import LoRAFile, check, find, read
from flowrl.tuning.lora import attach_file
from flowrl.tuning.writer import lora_config, write

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


def mixed():
    """Two layers of ranks 4 and 2, scaled by 3 and by 1/2."""
    one, other = given(LAYERS[:1], rank=4, alpha=12.0), given(LAYERS[1:], rank=2, alpha=1.0)
    return LoRAFile(one.a | other.a, one.b | other.b, one.alpha | other.alpha)


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


def checkpoint_of(run, weights):
    """A run's newest checkpoint, which names the adapter and tells no alpha."""
    tensors = {f"{name}.lora_A.policy.weight": value for name, value in weights.a.items()}
    tensors |= {f"{name}.lora_B.policy.weight": value for name, value in weights.b.items()}
    return checkpoint.save(
        run / "checkpoints", keep=1, weights={"ema": tensors}, state={"num_iterations": 3}
    )


def test_a_checkpoint_is_read_at_the_alpha_of_its_run(tmp_path):
    """The configuration's, or layer by layer that of the LoRA it began from. Mutation: take the
    rank for alpha.
    """
    file = checkpoint_of(tmp_path, mixed()) / "ema.safetensors"
    with pytest.raises(ValueError, match=r"does not tell its alpha.*export_lora.py"):
        read(file)
    (tmp_path / "config.yaml").write_text("lora: {rank: 4, alpha: 8}\n")
    for source in (file, tmp_path):
        assert read(source).alpha == dict.fromkeys(LAYERS, 8.0)
    write(mixed(), tmp_path / "start", "comfy")
    (tmp_path / "config.yaml").write_text("lora: {rank: null, alpha: null}\n")
    assert read(tmp_path).alpha == mixed().alpha


def test_a_runs_newest_whole_checkpoint_is_taken(tmp_path, caplog):
    """As training takes it, said once though it is asked twice. Mutation: take the last folder with
    a state.json.
    """
    for number in (1, 2):
        path = checkpoint.save(
            tmp_path / "checkpoints",
            keep=2,
            weights={"ema": {"a": torch.ones(2)}},
            state={"num_iterations": number},
        )
    (path / "ema.safetensors").write_bytes(b"cut")
    for _ in range(2):
        assert find(tmp_path) == tmp_path / "checkpoints" / "000001" / "ema.safetensors"
    (message,) = caplog.messages
    assert "000002/ema.safetensors is damaged" in message and "going on from" in message
    assert Subject.read(str(tmp_path)).weights() == [find(tmp_path)]


def test_a_run_is_its_export_or_else_its_newest_checkpoint(tmp_path):
    """Mutation: the checkpoint over the export, or what it began from."""
    weights = given()
    write(mixed(), tmp_path / "start", "comfy")
    newest = checkpoint_of(tmp_path, weights)
    assert find(tmp_path) == newest / "ema.safetensors"
    export = write(weights, tmp_path / "lora", "diffusers")
    assert find(tmp_path) == find(tmp_path / "lora") == find(export) == export


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


REFUSED = {
    "DoRA": (
        "transformer.x.lora_magnitude_vector",
        "transformer.x.dora_scale",
        "lora_unet_x.dora_scale",
    ),
    "LoKr": ("lycoris_x.lokr_w1",),
    "LoHa": ("lora_unet_x.hada_w1_a",),
    "a LoRA under kohya's names": (
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha",
    ),
    "names of layers of the model's first code": (
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight",
        "joint_blocks.0.x_block.attn.qkv.lora_A.weight",
    ),
    "a LoRA with biases": ("transformer.x.lora_B.bias",),
    "a difference of whole weights": ("diffusion_model.x.diff",),
}


@pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name, keys in REFUSED.items() for key in keys]
)
def test_what_other_programs_write_is_refused_by_its_name(name, key, tmp_path):
    """Mutation: call it no LoRA weight, or a LoRA of another architecture."""
    file = write(given(), tmp_path, "comfy")
    save_file(load_file(file) | {key: torch.ones(2, 2)}, file)
    with pytest.raises(UserError, match=f"{name}.*{re.escape(key)}.*; "):
        read(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("use_dora", True, "DoRA"),
        ("peft_type", "LOHA", "peft_type=LOHA"),
        ("init_lora_weights", "pissa_niter_4", "changed the base as well"),
        ("lora_alpha", "x", "alpha='x'"),
    ],
)
def test_settings_under_which_the_matrices_are_not_all_are_refused(key, value, words, tmp_path):
    """Mutation: read A and B whatever the configuration says."""
    write(given(), tmp_path, "peft")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=words):
        read(tmp_path)
    path.write_text("{")
    with pytest.raises(
        UserError, match=r"adapter_config.json: its LoRA configuration cannot be read"
    ):
        read(tmp_path)


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
    with pytest.raises(
        ValueError, match=f"{words} fit this FluxTransformer2DModel.*another architecture"
    ):
        check(given(layers, width=width), network(), tmp_path)


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


def pair(a, b):
    return {"transformer.x.lora_A.weight": a, "transformer.x.lora_B.weight": b}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "no LoRA weights"),
        ({"transformer.x.lora_A.weight": torch.ones(2, 2)}, "x has only one of its two matrices"),
        (
            {"transformer.x.alpha": torch.tensor(2.0)},
            "x has only one of its two matrices|no LoRA weights",
        ),
        ({"decoder.weight": torch.ones(2, 2)}, "'decoder.weight' is no LoRA weight"),
        (pair(torch.ones(2, 4), torch.ones(4, 3)), "the matrices of x have ranks 2 and 3"),
        (pair(torch.ones(0, 4), torch.ones(4, 0)), "the matrices of x have ranks 0 and 0"),
        (pair(torch.ones(2, 4, 1, 1), torch.ones(4, 2, 1, 1)), "x is a convolution's"),
        (pair(torch.full((2, 4), torch.nan), torch.ones(4, 2)), "not finite"),
        (pair(torch.ones(2, 4, dtype=torch.int8), torch.ones(4, 2)), "not finite numbers"),
        (
            pair(torch.ones(2, 4), torch.ones(4, 2)) | {"x.lora_down.weight": torch.ones(2, 4)},
            "holds 'x' twice",
        ),
        (
            pair(torch.ones(2, 4), torch.ones(4, 2)) | {"x.alpha": torch.ones(3)},
            "'x.alpha' is no LoRA weight",
        ),
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
    with pytest.raises(ValueError, match="neither a LoRA nor a checkpoint there"):
        read(tmp_path)
    (tmp_path / "x.bin").write_bytes(b"12345678901")
    with pytest.raises(ValueError, match=r"x\.bin: a LoRA is read from \.safetensors files alone"):
        read(tmp_path / "x.bin")
    (tmp_path / "x.safetensors").write_bytes(b"12345678901")
    with pytest.raises(ValueError, match=r"x\.safetensors is damaged"):
        read(tmp_path)
    (tmp_path / "y.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="2 LoRA files in this folder; give one by name"):
        read(tmp_path)


def test_two_alphas_of_one_layer_are_refused(tmp_path):
    """ComfyUI takes the tensor, diffusers the configuration. Mutation: take either."""
    file = write(given(), tmp_path, "diffusers")
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    alpha = f"transformer.{LAYERS[0]}.alpha"
    save_file(load_file(file) | {alpha: torch.tensor(12.0)}, file, metadata)
    assert read(file).alpha == given().alpha
    save_file(load_file(file) | {alpha: torch.tensor(4.0)}, file, metadata)
    with pytest.raises(
        UserError, match=r"two alphas of .*: 4 in a tensor, 12 in its configuration"
    ):
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
