"""A LoRA of several networks: its layers' names, and its files."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from flowrl.errors import UserError
from flowrl.models.experts import Experts
from flowrl.runs import checkpoint
from flowrl.sharing.loading_code import loading_code
from flowrl.tuning.formats import check, files_of, read
from flowrl.tuning.lora_file import LoRAFile
from flowrl.tuning.networks import companion_of, companions_of, network_of
from flowrl.tuning.writer import write

LAYERS = ("transformer.blocks.0.to_q", "transformer.blocks.1.to_q", "transformer_2.blocks.0.to_q")
ALPHA = dict(zip(LAYERS, (4.0, 8.0, 2.0), strict=True))


def lora():
    generator = torch.Generator().manual_seed(0)
    a = {name: torch.randn(2, 4, generator=generator) for name in LAYERS}
    b = {name: torch.randn(4, 2, generator=generator) for name in LAYERS}
    return LoRAFile(a, b, ALPHA, notes={"flowrl.name": "two"})


def network():
    return nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"to_q": nn.Linear(4, 4)})])})


def assert_equal(one, two):
    assert one.a.keys() == two.a.keys() and one.alpha == two.alpha
    for name in one.a:
        assert torch.equal(one.a[name], two.a[name]) and torch.equal(one.b[name], two.b[name])


@pytest.mark.parametrize("form", ["diffusers", "comfy"])
def test_a_file_for_each_network_is_read_back_as_one(form, tmp_path):
    """Under the names that stock loaders know, each network's alone. Mutations: leave a file out,
    write a network's name twice, or lose alphas.
    """
    first = write(lora(), tmp_path, form)
    assert files_of(tmp_path) == [first, companion_of(first, "transformer_2")]
    for file, count in zip(files_of(tmp_path), (2, 1), strict=True):
        matrices = [key for key in load_file(file) if ".lora_A." in key]
        assert len(matrices) == count
        assert all(key.startswith("transformer.blocks.") for key in matrices)
    for source in (tmp_path, first):
        again = read(source)
        assert_equal(again, lora())
        assert again.notes == {"flowrl.name": "two"}


def test_a_checkpoint_holds_both(tmp_path):
    """Whose keys begin with the networks' names, as a file's with its prefix; alpha is that of the
    start. Mutation: take the first network's name for the prefix.
    """
    weights = lora()
    tensors = {f"{name}.lora_A.policy.weight": value for name, value in weights.a.items()}
    tensors |= {f"{name}.lora_B.policy.weight": value for name, value in weights.b.items()}
    checkpoint.save(
        tmp_path / "checkpoints", keep=1, weights={"ema": tensors}, state={"num_iterations": 1}
    )
    write(weights, tmp_path / "start", "comfy")
    (tmp_path / "config.yaml").write_text("lora: {rank: null, alpha: null}\n")
    assert_equal(read(tmp_path), weights)


def test_other_files_are_no_companions(tmp_path):
    """Mutation: take every file beside a LoRA for another network's."""
    first = tmp_path / "style.safetensors"
    for name in ("style", "style.transformer_2", "style.transformer_ema", "other.transformer_2"):
        (tmp_path / f"{name}.safetensors").touch()
    assert companions_of(first) == {"transformer_2": tmp_path / "style.transformer_2.safetensors"}
    assert network_of("transformer_2.blocks.0") == "transformer_2"
    assert network_of("transformer_blocks.0") is network_of("blocks.0.transformer") is None


def test_a_folder_may_hold_another_networks_file_beside_the_only_one(tmp_path):
    """Mutation: count both, and refuse the folder."""
    source = write(lora(), tmp_path / "run", "diffusers")
    (tmp_path / "own").mkdir()
    for file, name in zip(files_of(source), ("high", "high.transformer_2"), strict=True):
        file.rename(tmp_path / "own" / f"{name}.safetensors")
    assert_equal(read(tmp_path / "own"), lora())


def test_the_lora_of_one_network_is_refused_for_two(tmp_path):
    """With the place that the other's file must have, of a folder too. Mutation: attach it to the
    first, or name a place beside the folder.
    """
    first = write(lora(), tmp_path, "diffusers")
    two = Experts({"transformer": network(), "transformer_2": network()})
    second = companion_of(first, "transformer_2")
    second.unlink()
    for source in (first, tmp_path):
        with pytest.raises(UserError) as error:
            check(read(source), two, source)
        assert str(error.value) == (
            f"{source} holds no LoRA of transformer_2, and the model has transformer and "
            f"transformer_2; put it beside, as {second}"
        )


def test_the_lora_of_the_second_network_alone_is_refused(tmp_path):
    """Mutation: ask only that each layer is some network's, and leave the first untrained."""
    whole = lora()
    a, b, alpha = (
        {name: value for name, value in table.items() if name.startswith("transformer_2.")}
        for table in (whole.a, whole.b, whole.alpha)
    )
    file = write(whole, tmp_path, "diffusers")
    two = Experts({"transformer": network(), "transformer_2": network()})
    with pytest.raises(UserError, match="holds no LoRA of transformer, and the model has"):
        check(LoRAFile(a, b, alpha), two, file)


def test_peft_takes_one_network(tmp_path):
    """Mutation: write both under one configuration."""
    with pytest.raises(UserError, match=r"--format=peft is for one network"):
        write(lora(), tmp_path, "peft")


def test_a_card_loads_both():
    """Mutation: load the second file into the first network."""
    names = {"transformer_2": "pytorch_lora_weights.transformer_2.safetensors"}
    code = loading_code(
        {"model": {"pretrained": "ORG/NAME"}}, "me/lora", "", "v1", companions=names
    )
    first, second = code.split("pipe.load_lora_weights(")[1:]
    assert first.startswith('"me/lora", revision="v1")\n')
    assert second.startswith(
        '\n    "me/lora",\n    revision="v1",\n    weight_name="pytorch_lora_weights.transformer_2'
        '.safetensors",\n    load_into_transformer_2=True,\n)\n'
    )
