"""A pipeline of two networks, of which its call asks one by the time, trained as one model."""

import json
import shutil

import pytest
import torch
from families import FAMILIES
from runs import awake, draw, fit, make
from safetensors import safe_open

from flowrl.errors import UserError
from flowrl.models.derived.adapter import Derived
from flowrl.models.experts import Experts, networks_of
from flowrl.models.quantization import is_quantized
from flowrl.training.export import export_average
from flowrl.training.parity import check
from flowrl.tuning import formats
from flowrl.tuning.full import Full
from flowrl.tuning.layer_names import NAMES
from flowrl.tuning.lora import LoRA
from flowrl.tuning.networks import companions_of

FAMILY = FAMILIES["wan22"]
PROMPTS = ["a red circle", "two blue squares and a green triangle"]
FIRST, SECOND = "transformer", "transformer_2"
CALL = {name: value for name, value in FAMILY.call.items() if name != "guidance_scale"}
RECIPE = {"rank": 4, "alpha": 8, "targets": "auto", "init": "gaussian"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return FAMILY.save(tmp_path_factory.mktemp("experts") / "wan22")


def derived(folder, dtype="float32", **options):
    settings = {"revision": None, "without": [], "guidance": None, "channels_last": False}
    settings |= {"pretrained": str(folder), "dtype": dtype, "call": CALL} | options
    return Derived(has_guidance=True, **settings)


def policy_of(folder, *overrides):
    """A policy that trains the first two of four steps, the noisier of which is the first
    network's.
    """
    call = ", ".join(f"{name}: {value}" for name, value in CALL.items())
    options = ("model=derived", f"model.pretrained={folder}", f"model.call={{{call}}}")
    options += ("model.dtype=float32", "lora.rank=4", "rollout.num_steps=4", "num_threads=1")
    options += ("rollout.guidance_scale=4", "evaluation.guidance_scale=4")
    options += ("rollout.trained={count: 2, low: 0, high: 2}", "reward=jpeg_compressibility")
    options += ("embeddings.folder=null", "data.prompts.count=8", "evaluation.max_prompts=2")
    options += ("batch.max_micro_batch=4", "num_iterations=1", *overrides)
    return make(*options)


def of_network(parameters, name):
    return {key: value for key, value in parameters.items() if key.startswith(f"{name}.")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_networks_do_as_the_stock_pipeline(dtype, folder):
    """Bitwise in float32, each with the scale of its own; every B of both has a gradient.

    Mutations: hand out float32 from the first network alone, or look for gradients at one step.
    """
    model = derived(folder, dtype)
    recipe = LoRA(**RECIPE)
    recipe.check_layers(model.transformer)
    trained = recipe.attach(model.transformer, 0).parameters()
    rows = model.encode_prompts(PROMPTS)
    for measured in check(model, rows, trained, scales=[1.0, 4.0], num_steps=4, seed=0):
        if dtype == "float32":
            assert (measured.velocity, measured.rollout, measured.image) == (0, 0, 0)
        elif measured.guidance_scale == 1:
            assert measured.velocity == 0
        assert measured.has_gradient == len(trained) // 2 == 32


def test_the_second_scale_is_the_second_networks(folder):
    """Mutation: leave the call's own arguments out."""
    sigmas = derived(folder).grid(4)
    models = [derived(folder, call=CALL | {"guidance_scale_2": scale}) for scale in (3.0, 5.0)]
    rows = models[0].encode_prompts(PROMPTS)
    x = torch.randn(2, *models[0].latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, two = ([model.velocity(x, s, rows, 4.0) for s in sigmas[:2]] for model in models)
    assert torch.equal(one[0], two[0]) and not torch.allclose(one[1], two[1])


def test_a_step_is_replayed_bitwise_and_trains_its_own_network(folder):
    """Mutation: adapt the first network alone."""
    policy, data, _ = policy_of(folder)
    awake(policy)
    part = draw(policy, data.iterations[0], range(4))
    weights = policy.tuning.parameters()
    assert part.trajectory.steps == (0, 1)
    for index, (ours, other) in enumerate([(FIRST, SECOND), (SECOND, FIRST)]):
        step = policy.objective.replay(part, index)
        assert torch.equal(step.mean, part.trajectory.old_mean[:, index])
        gradients = torch.autograd.grad(
            step.mean.square().mean(), list(weights.values()), allow_unused=True
        )
        reached = {name: g for name, g in zip(weights, gradients, strict=True) if g is not None}
        assert reached.keys() == of_network(weights, ours).keys()
        assert all(gradient.any() for gradient in reached.values())
        assert not of_network(reached, other)


def test_an_update_gives_every_weight_a_gradient(folder, tmp_path):
    """Of zeros where no step asks its network, so that averaging processes wait for none in vain;
    both files of the export say what was trained.

    Mutation: leave weights without a gradient, or the second file without notes.
    """
    policy, data, _ = policy_of(folder, "rollout.trained={count: 1, low: 0, high: 1}")
    before = {name: value.detach().clone() for name, value in policy.tuning.parameters().items()}
    fit(policy, data)
    after = policy.tuning.parameters()
    assert policy.has_passed_gate
    assert all(value.grad is not None for value in after.values())
    assert not any(value.grad.any() for value in of_network(after, SECOND).values())
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert of_network(after, FIRST).keys() <= moved
    assert not {name for name in of_network(after, SECOND) if "lora_B" in name} & moved
    for file in formats.files_of(export_average(policy, tmp_path, {"flowrl.name": "two"})):
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata()["flowrl.name"] == "two"


def test_the_reference_is_the_base_of_both(folder):
    """Mutation: switch the adapter of the first network off alone."""
    model = derived(folder)
    rows = model.encode_prompts(PROMPTS)
    sigmas = model.grid(4)[:2]
    x = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))

    def velocities():
        with torch.no_grad():
            return [model.velocity(x, sigma, rows, 4.0) for sigma in sigmas]

    base = velocities()
    tuning = LoRA(**RECIPE).attach(model.transformer, 0)
    fresh = velocities()
    with torch.no_grad():
        for parameter in tuning.parameters().values():
            parameter.normal_(0, 0.05)
    moved = velocities()
    with tuning.at_reference():
        back = velocities()
    for one, two, three, four in zip(base, fresh, moved, back, strict=True):
        assert torch.equal(one, two) and torch.equal(one, four) and not torch.equal(one, three)


def test_the_stock_pipeline_loads_both_files(folder, tmp_path):
    """And so does a run that begins from them. Mutations: one file for both, the first one's layers
    in each, or a reader that leaves the second file out.
    """
    policy, _, _ = policy_of(folder)
    awake(policy)
    policy.tuning.save(policy.model.pipeline, tmp_path)
    assert [path.name for path in formats.files_of(tmp_path)] == [
        "pytorch_lora_weights.safetensors",
        "pytorch_lora_weights.transformer_2.safetensors",
    ]
    stock = derived(folder)
    rows = stock.encode_prompts(PROMPTS)
    sigmas = stock.grid(4)[:2]
    x = torch.randn(2, *stock.latent_shape, generator=torch.Generator().manual_seed(2))
    stock.pipeline.load_lora_weights(tmp_path)
    (second,) = companions_of(tmp_path / NAMES["diffusers"]).values()
    stock.pipeline.load_lora_weights(
        tmp_path, weight_name=second.name, load_into_transformer_2=True
    )
    start = [f"lora.start={tmp_path}", "lora.rank=null", "lora.alpha=null", "lora.targets=null"]
    begun, _, _ = policy_of(folder, *start)
    for name, value in policy.tuning.parameters().items():
        assert torch.equal(begun.tuning.parameters()[name], value)
    policy.model.grid(4)
    with torch.no_grad():
        for sigma in sigmas:
            expected = policy.model.velocity(x, sigma, rows, 4.0)
            loaded = stock.velocity(x, sigma, rows, 4.0)
            assert (loaded - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_backend_is_that_of_both_networks(folder):
    """Mutation: set one of the options for the first network alone."""
    backend = ("backend.gradient_checkpointing=true", "backend.attention=_native_math")
    policy, _, _ = policy_of(folder, "model.quantization=int8", "backend=plain", *backend)
    network = policy.transformer
    assert isinstance(network, Experts) and network.is_gradient_checkpointing
    for part in networks_of(network).values():
        assert part.is_gradient_checkpointing and is_quantized(part)
        processors = part.attn_processors.values()
        assert all(processor._attention_backend == "_native_math" for processor in processors)
    network.disable_gradient_checkpointing()
    assert not network.is_gradient_checkpointing
    assert not any(part.is_gradient_checkpointing for part in network.children())


def test_what_would_leave_a_network_untrained_is_refused(folder, tmp_path):
    """In one sentence: layers of one alone, all weights, and a network that no step asks.

    Mutation: any of the three goes through.
    """
    network = derived(folder).transformer
    recipe = LoRA(**RECIPE | {"targets": r"transformer_2\..*to_q"})
    with pytest.raises(UserError, match=r"names no layer of transformer, which would go untrained"):
        recipe.check_layers(network)
    with pytest.raises(UserError, match=r"trains one network, and the pipeline has 2; set tuning="):
        Full(dtype="float32").check_layers(network)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"boundary_ratio": None}))
    call = {name: value for name, value in CALL.items() if name != "guidance_scale_2"}
    model = derived(copy, call=call)
    trained = LoRA(**RECIPE).attach(model.transformer, 0).parameters()
    rows = model.encode_prompts(PROMPTS)
    with pytest.raises(UserError, match=r"in 4 steps it never asks its transformer_2"):
        check(model, rows, trained, scales=[1.0], num_steps=4, seed=0)
