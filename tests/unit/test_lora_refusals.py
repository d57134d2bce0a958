"""LoRA files that do not fit, are damaged or are no LoRA are refused by what is wrong."""

import json
import re

import pytest
import torch
from lora_weights import LAYERS, given, network
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flowrl.errors import UserError
from flowrl.tuning.formats import check, read
from flowrl.tuning.writer import write

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
