"""A pipeline's weights as people have them: cut, of other networks, saved with an adapter. Each is
answered before it is used.
"""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from embedded_pipeline import EMBEDDED, T5, TEXT, TRANSFORMER, VAE, change, encode, refusal
from peft import LoraConfig
from safetensors.torch import load_file
from tiny import FAMILIES

from flowrl.models.loading import Source
from flowrl.models.sd3 import SD3


def spoil(weights):
    """One number of the weight that is named last."""
    weights[max(weights)].view(-1)[-1] = torch.nan


@pytest.mark.parametrize(("file", "total"), [(TRANSFORMER, 95), (VAE, 132), (TEXT, 53), (T5, 12)])
def test_missing_weights_are_counted(embedded_folder, file, total):
    """The totals are the networks' own. Mutation: ask for weights on meta alone, which transformers
    never leaves.
    """
    gone = sorted(load_file(embedded_folder / file))[:3]
    change(embedded_folder / file, lambda weights: [weights.pop(name) for name in gone])
    text = refusal(embedded_folder)
    missing = f"3 of its {total} weights are missing, the first '"
    assert f"{embedded_folder}: {file.split('/')[0]}: {missing}" in text
    assert any(f"first '{name}'" in text for name in gone)
    assert text.endswith(f"restore {(embedded_folder / file).parent} or download it again")


@pytest.mark.parametrize("file", [TRANSFORMER, VAE, TEXT, T5])
def test_weights_that_are_no_numbers(embedded_folder, file):
    """Mutation: look at a network's first weight alone."""
    change(embedded_folder / file, spoil)
    name = max(load_file(embedded_folder / file))
    assert f"{file.split('/')[0]}: its weight '{name}' holds NaN or infinity" in refusal(
        embedded_folder
    )


@pytest.mark.parametrize("file", [TRANSFORMER, VAE, TEXT, T5])
def test_weights_of_another_shape(embedded_folder, file):
    """Mutation: the library's own four sentences, or its flag that draws them at random."""
    name = min(load_file(embedded_folder / file))
    change(embedded_folder / file, lambda weights: weights.update({name: torch.zeros(7, 3)}))
    text = refusal(embedded_folder)
    assert file.split("/")[0] in text and f"'{name}'" in text and "(7, 3)" in text


@pytest.mark.parametrize("file", [TRANSFORMER, VAE])
def test_weights_without_a_place(embedded_folder, file):
    """As where config.json says fewer layers. Mutation: leave them out with the library's
    warning.
    """
    change(
        embedded_folder / file, lambda weights: weights.update({"blocks.99.weight": torch.zeros(3)})
    )
    text = refusal(embedded_folder)
    assert (
        f"{file.split('/')[0]}: weights without a place in the network of its config.json: 1"
        in text
    )
    assert "'blocks.99.weight'" in text


def test_a_text_encoder_may_bring_more(embedded_folder, caplog):
    """Released ones carry heads and decoders. Mutation: refuse them, or say nothing."""
    change(embedded_folder / T5, lambda weights: weights.update({"lm_head.weight": torch.zeros(3)}))
    _, conditioning = encode(embedded_folder)
    assert torch.equal(conditioning.tensors["tokens"], encode(EMBEDDED)[1].tensors["tokens"])
    assert (
        "text_encoder_3: weights without a place" in caplog.text
        and "'lm_head.weight'" in caplog.text
    )


def with_adapter():
    pipe = StableDiffusion3Pipeline.from_pretrained(EMBEDDED)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False))
    return pipe


def test_a_pipeline_saved_with_its_adapter(tmp_path):
    """A query's weight and bias stand under other names, beside two matrices.

    Mutation: the remedy of a cut download, which cannot help here.
    """
    with_adapter().save_pretrained(tmp_path / "saved")
    text = refusal(tmp_path / "saved")
    layers = sum(name.endswith(".to_q.weight") for name in load_file(EMBEDDED / TRANSFORMER))
    assert f"transformer: {2 * layers} of its 95 weights are missing, the first " in text
    assert f"and {4 * layers} of an attached adapter are there instead" in text
    assert "fuse_lora() and then unload_lora_weights()" in text and "lora.start" in text


def test_a_text_encoder_saved_with_its_adapter(embedded_folder):
    """Under the names that peft gives. Mutation: look for adapters in the transformer alone."""

    def attach(weights):
        for name in [name for name in weights if name.endswith("q_proj.weight")]:
            stem = name.removesuffix(".weight")
            weights[f"{stem}.base_layer.weight"] = weights.pop(name)
            weights[f"{stem}.lora_A.default.weight"] = torch.zeros(2, 2)

    change(embedded_folder / TEXT, attach)
    text = refusal(embedded_folder)
    assert (
        "text_encoder: " in text
        and "of an attached adapter are there instead" in text
        and "fuse_lora()" in text
    )


def test_the_remedy_of_an_adapter_helps(tmp_path):
    """What the refusal tells to do gives a pipeline that loads, with the LoRA in its weights.

    Mutation: tell to unload alone, which gives the base.
    """
    pipe = with_adapter()
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "fused")
    fused, base = encode(tmp_path / "fused")[0].transformer, encode(EMBEDDED)[0].transformer
    same = [torch.equal(a, b) for a, b in zip(fused.parameters(), base.parameters(), strict=True)]
    assert same.count(False) == sum(".to_q.weight" in name for name, _ in base.named_parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_checked(name, tiny_pipelines, tmp_path):
    """The transformer and the first text encoder of each. Mutation: check one family's alone."""
    family = FAMILIES[name]
    texts = [
        "text_encoder",
        "tokenizer",
        "text_encoder_2",
        "tokenizer_2",
        "text_encoder_3",
        "tokenizer_3",
    ]
    source = Source(family.stock, str(tiny_pipelines[name]), None, "float32")
    whole = source.load()
    assert [
        part for part in ("transformer", "vae", "text_encoder") if getattr(whole, part) is None
    ] == []
    for part in ("transformer", "text_encoder"):
        folder = Path(shutil.copytree(tiny_pipelines[name], tmp_path / part))
        file = next((folder / part).glob("*.safetensors"))
        gone = min(load_file(file))
        change(file, lambda weights, gone=gone: weights.pop(gone))
        left_out = (
            dict.fromkeys(set(texts) & whole.components.keys()) if part == "transformer" else {}
        )
        with pytest.raises(
            ValueError, match=rf"{part}: \d of its \d+ weights are missing, the first '"
        ):
            Source(family.stock, str(folder), None, "float32").load(**left_out)


def test_the_autoencoder_may_decode_in_float32():
    """Beside a transformer in bfloat16, with its weights as they are on disk: the images are those
    of a model in float32.

    Mutation: load it in the dtype of the others, or round it on the way.
    """
    options = {
        "pretrained": str(EMBEDDED),
        "revision": None,
        "resolution": 32,
        "max_sequence_length": 0,
        "has_guidance": False,
        "channels_last": False,
    }
    whole = SD3(dtype="float32", **options)
    mixed = SD3(dtype="bfloat16", decode_dtype="float32", **options)
    plain = SD3(dtype="bfloat16", **options)
    assert mixed.transformer.dtype == plain.vae.dtype == torch.bfloat16
    assert mixed.vae.dtype == torch.float32
    x0 = torch.randn(2, *whole.latent_shape, generator=torch.Generator().manual_seed(0))
    images = whole.decode(x0)
    assert torch.equal(mixed.decode(x0), images)
    assert not torch.equal(plain.decode(x0), images)
