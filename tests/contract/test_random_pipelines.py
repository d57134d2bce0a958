"""What every family's small pipeline must keep, so that a test of another thing can build on it:
stock diffusers loads and samples it, and nothing in it is dead.
"""

import inspect
from contextlib import contextmanager

import pytest
import random_pipelines
import torch
from diffusers import DiffusionPipeline
from families import FAMILIES, words
from families.family import strengthen, wake
from torch import nn

from flowrl.launch.errors import one_line_errors

ORDINARY = ("sd3", "z_image", "wan21")
every = pytest.mark.parametrize(
    "name",
    [name if name in ORDINARY else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES],
)
NETWORKS = ("transformer", "transformer_2", "unet")
STEPS = 4


@pytest.fixture(scope="module")
def stock_of(tmp_path_factory):
    """A family's pipeline as stock diffusers loads it, made once."""
    loaded = {}

    def load(name):
        if name not in loaded:
            folder = FAMILIES[name].save(tmp_path_factory.mktemp("random") / name)
            loaded[name] = DiffusionPipeline.from_pretrained(folder)
            loaded[name].set_progress_bar_config(disable=True)
        return loaded[name]

    return load


def sample(pipe, name, prompt="a red circle", seed=0, **changed):
    """Pictures (1, 3, H, W), or clips (1, T, 3, H, W), as the stock pipeline draws them."""
    arguments = FAMILIES[name].arguments(prompt, seed, STEPS) | changed
    return pipe(output_type="pt", **arguments)[0]


@contextmanager
def stopped(scheduler, at):
    """What a pipeline hands to its scheduler's step number `at`, in a list; the call ends there."""
    kind = type(scheduler)
    step, seen, calls = kind.step, [], []

    def stop(self, prediction, timestep, state, **more):
        calls.append(timestep)
        if len(calls) > at:
            seen.append(prediction)
            raise StopIteration
        return step(self, prediction.detach(), timestep, state, **more)

    kind.step = stop
    try:
        yield seen
    finally:
        kind.step = step


def attention_layers(network):
    """The linear layers of a network's attention, by name."""
    places = [name for name, module in network.named_modules() if hasattr(module, "set_processor")]
    return {
        name: layer
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear) and name.startswith(tuple(f"{place}." for place in places))
    }


def tells_time(key):
    """Whether a parameter's place is one that families embed the time at."""
    places = ("t_embedder", "distilled_guidance_layer")
    return any("time" in place or place in places for place in key.split("."))


def is_reached(parameter):
    return parameter.grad is not None and bool(parameter.grad.any())


@every
def test_stock_diffusers_draws_what_is_asked_for(name, stock_of):
    """Seed, prompt and picture decide what is drawn, and the call decides how large.

    Mutation: leave a gate at zero, or cut the prompt off with its template.
    """
    family, pipe = FAMILIES[name], stock_of(name)
    drawn = sample(pipe, name)
    call = family.call
    frames = (call["num_frames"],) if "num_frames" in call else ()
    assert drawn.shape == (1, *frames, 3, call["height"], call["width"])
    assert torch.isfinite(drawn).all() and drawn.std() > 0.1
    assert torch.equal(drawn, sample(pipe, name))
    others = [
        sample(pipe, name, prompt="two blue squares left of a green triangle"),
        sample(pipe, name, seed=1),
    ]
    if family.picture:
        others.append(sample(pipe, name, image=family.draw(seed=1)))
    for other in others:
        assert (drawn - other).abs().mean() > 0.002


@every
def test_every_attention_layer_has_a_gradient(name, stock_of):
    """So has everything that tells the time; layers that cannot have one are listed.

    Mutation: leave a gate at zero, or list no idle layer.
    """
    pipe = stock_of(name)
    networks = [getattr(pipe, part) for part in NETWORKS if getattr(pipe, part, None) is not None]
    for network in networks:
        network.requires_grad_(True).zero_grad(set_to_none=True)
    call = inspect.unwrap(type(pipe).__call__)
    # Wan 2.2's second network acts on the last steps alone.
    for at in (0, STEPS - 1):
        with stopped(pipe.scheduler, at) as seen, pytest.raises((StopIteration, RuntimeError)):
            call(pipe, **FAMILIES[name].arguments("a red circle", num_steps=STEPS))
        seen[0].square().mean().backward()
    for network in networks:
        layers = attention_layers(network)
        assert len(layers) >= 6
        idle = [layer for layer, module in layers.items() if not is_reached(module.weight)]
        assert tuple(idle) == FAMILIES[name].idle
        clock = [p for key, p in network.named_parameters() if tells_time(key)]
        assert clock and all(map(is_reached, clock))


def test_a_seed_decides_the_weights():
    """And the caller's random numbers are left alone. Mutation: seed nothing, or no longer fork."""
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, again, other = (
        FAMILIES["z_image"].make(seed).transformer.state_dict() for seed in (3, 3, 4)
    )
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(
        first["layers.0.attention.to_q.weight"], other["layers.0.attention.to_q.weight"]
    )
    assert {value.dtype for value in first.values()} == {torch.float32}


def test_only_what_is_zero_is_drawn():
    """Mutation: draw everything, or nothing."""
    network = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    nn.init.zeros_(network[1].weight)
    before = network[0].weight.clone()
    wake(network)
    assert torch.equal(network[0].weight, before)
    assert network[1].weight.std().item() == pytest.approx(0.2, rel=0.1)
    assert not network.training


def test_a_layer_keeps_its_inputs_size():
    """A fresh layer's outputs have a third of its inputs' variance. Mutation: leave the weights."""
    torch.manual_seed(0)
    layer = nn.Linear(256, 256, bias=False)
    strengthen(layer)
    with torch.no_grad():
        assert layer(torch.randn(512, 256)).std().item() == pytest.approx(1, abs=0.05)


def test_words_of_templates_are_one_token_each():
    """A word that is not known keeps its longest known beginning, letter by letter after it.

    Mutation: begin each merge anew.
    """
    qwen = words.qwen_tokenizer()
    assert qwen.tokenize("a red circle, redo") == ["a", "Ġred", "Ġcircle", ",", "Ġred", "o"]
    assert words.gemma_tokenizer().tokenize("a red circle") == ["a", "▁red", "▁circle"]
    assert words.llama_tokenizer().tokenize("a red circle") == ["▁a", "▁red", "▁circle"]
    assert words.glm_tokenizer()("").input_ids == [1, 2]
    marked = qwen.tokenize("<|im_start|>a red circle<|im_end|>")
    assert marked == ["<|im_start|>", "a", "Ġred", "Ġcircle", "<|im_end|>"]


def test_the_script_writes_a_family(monkeypatch, tmp_path, capsys):
    """And names what it does not know. Mutation: take an unknown name for a model option."""

    def run(*words):
        monkeypatch.setattr("sys.argv", ["random_pipelines.py", *words])
        status = one_line_errors(random_pipelines.main)
        return status, *capsys.readouterr()

    status, out, _ = run("z_image", str(tmp_path / "here"))
    assert status == 0
    assert out.startswith(f"{tmp_path}/here: ZImagePipeline") and '"guidance_scale": 4.0' in out
    assert DiffusionPipeline.load_config(tmp_path / "here")["_class_name"] == "ZImagePipeline"
    status, _, err = run("wan99")
    assert status != 0 and err.startswith("error: wan99: no such family; known are sd3, ")
    assert err.count("\n") == 1
    monkeypatch.chdir(tmp_path)
    assert run("wan21")[0] == 0
    assert (tmp_path / "random_pipelines" / "wan21" / "transformer").is_dir()
