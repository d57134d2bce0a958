"""The ways to compute a layer with a LoRA: the same sum with less work, reproduced bitwise by
replays, and refused where it would round the LoRA away.
"""

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from peft import LoraConfig
from runs import awake, composed, first_batch, fit, make, term_loss
from torch import nn

from flowrl.errors import UserError
from flowrl.tuning.lora import LoRA
from flowrl.tuning.lora_layers import set_compute

OTHERS = ("base_dtype", "merged")
SHAPES = [(6,), (4, 6), (2, 4, 6), (2, 3, 4, 6)]


def layer(compute, dtype=torch.float32, has_bias=True):
    """A linear layer 6 -> 5 with a LoRA of rank 2 and scale 1.5, away from zero."""
    from peft import inject_adapter_in_model

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 5, bias=has_bias)).to(dtype)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["0"], init_lora_weights=False)
    set_compute(config, compute)
    inject_adapter_in_model(config, network, "policy")
    for name, value in network.named_parameters():
        if "lora_" in name:
            value.data = value.data.float()
    return network


def formula(network, x):
    """W x + bias + s B A x in float64, and its gradients at x, A and B, for a sum of squares."""
    linear = network[0]
    a, b = (
        matrix["policy"].weight.detach().double().requires_grad_()
        for matrix in (linear.lora_A, linear.lora_B)
    )
    x = x.detach().double().requires_grad_()
    y = x @ linear.base_layer.weight.double().T + 1.5 * (x @ a.T) @ b.T
    if linear.base_layer.bias is not None:
        y = y + linear.base_layer.bias.double()
    y.square().sum().backward()
    return y, x.grad, a.grad, b.grad


@pytest.mark.parametrize("compute", ["adapter", *OTHERS])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_output_and_gradients_are_those_of_the_formula(compute, shape, has_bias):
    """For rows with any axes before them.

    Mutation: leave out the scale of a gradient, or take B for A.
    """
    network = layer(compute, has_bias=has_bias)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    wanted = formula(network, x)
    y = network(x)
    y.square().sum().backward()
    a, b = network[0].lora_A["policy"].weight.grad, network[0].lora_B["policy"].weight.grad
    for ours, theirs in zip((y, x.grad, a, b), wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=2e-5)
    assert network[0].base_layer.weight.grad is None


@pytest.mark.parametrize("compute", OTHERS)
def test_the_weights_alone_may_have_gradients(compute):
    """The network's first layer has inputs without. Mutation: leave A's out with the inputs'."""
    network = layer(compute)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    network(x).square().sum().backward()
    _, _, of_a, of_b = formula(network, x)
    for matrices, wanted in ((network[0].lora_A, of_a), (network[0].lora_B, of_b)):
        ours = matrices["policy"].weight.grad.double()
        torch.testing.assert_close(ours, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("compute", OTHERS)
def test_switched_off_a_layer_is_the_base_bitwise(compute):
    """Mutation: ask for the LoRA even so."""
    network = layer(compute)
    x = torch.randn(4, 6)
    network[0].enable_adapters(False)
    assert torch.equal(network(x), network[0].base_layer(x))
    network[0].enable_adapters(True)
    assert not torch.equal(network(x), network[0].base_layer(x))


def kept(network, x):
    """The tensors as long as the rows of x that autograd holds, by dtype."""
    dtypes = []

    def pack(value):
        if len(value) == len(x):
            dtypes.append(value.dtype)
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        network(x)
    return set(dtypes)


def test_a_base_in_bfloat16_holds_nothing_long_in_float32():
    """peft casts the inputs to the matrices' dtype, and holds the copy.

    Mutation: multiply in the dtype of A.
    """
    x = torch.randn(64, 6, dtype=torch.bfloat16, requires_grad=True)
    assert torch.float32 in kept(layer("adapter", torch.bfloat16), x)
    assert kept(layer("base_dtype", torch.bfloat16), x) == {torch.bfloat16}
    network = layer("base_dtype", torch.bfloat16)
    y = network(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert network[0].lora_A["policy"].weight.grad.dtype == torch.float32
    wanted, *_ = formula(network, x)
    torch.testing.assert_close(y.double(), wanted, rtol=0.02, atol=0.02)


CASES = [("base_dtype", "float32"), ("base_dtype", "bfloat16"), ("merged", "float32")]


@pytest.mark.parametrize(("compute", "dtype"), CASES)
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_a_replay_is_bitwise(compute, dtype, is_checkpointed):
    """With gradients and without: ratio 1. Mutation: compute otherwise without gradients."""
    policy, data, _ = make(f"lora.compute={compute}", f"model.dtype={dtype}")
    if is_checkpointed:
        policy.transformer.enable_gradient_checkpointing()
    for part in first_batch(awake(policy), data):
        for index in range(len(part.trajectory.steps)):
            step = policy.objective.replay(part, index)
            assert step.mean.requires_grad
            assert torch.equal(step.mean, part.trajectory.old_mean[:, index])


@pytest.fixture(scope="module")
def trained():
    """The LoRA after the two iterations of a smoke run, by the way in which it is computed."""
    weights = {}
    for compute in ("adapter", *OTHERS):
        policy, data, _ = make(f"lora.compute={compute}")
        before = {
            name: value.detach().clone() for name, value in policy.tuning.parameters().items()
        }
        fit(policy, data)
        after = policy.tuning.parameters()
        weights[compute] = {name: after[name].detach() - before[name] for name in after}
    return weights


@pytest.mark.parametrize("compute", OTHERS)
def test_a_run_learns_the_same_but_for_rounding(compute, trained):
    """Mutation: a gradient of the wrong sign or scale."""
    for name, moved in trained["adapter"].items():
        difference = (trained[compute][name] - moved).norm()
        assert difference <= 0.02 * moved.norm(), name


def gradient(compute, dtype):
    """That of a term of an update at LoRA weights away from zero."""
    policy, data, _ = make(f"lora.compute={compute}", f"model.dtype={dtype}")
    part = first_batch(awake(policy), data)[0]
    part.advantage = torch.linspace(-1, 1, len(part.rows))
    term_loss(policy, part, 1).backward()
    found = [
        value.grad.flatten()
        for value in policy.tuning.parameters().values()
        if value.grad is not None
    ]
    return torch.cat(found)


def test_gradients_in_bfloat16_are_as_good_as_pefts():
    """Measured from those in float32. Mutation: round A, B or the low-rank output once more."""
    exact = gradient("adapter", "float32")
    errors = {
        compute: ((gradient(compute, "bfloat16") - exact).norm() / exact.norm()).item()
        for compute in ("adapter", "base_dtype")
    }
    print(errors)
    assert errors["base_dtype"] <= 1.5 * errors["adapter"]
    assert errors["adapter"] < 0.5


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["model.dtype=bfloat16"], "bfloat16"),
        (["+model.quantization=int8"], "int8"),
        (["+model.quantization=nf4"], "uint8"),
    ],
)
def test_a_sum_is_refused_where_the_base_has_few_bits(words, kind):
    """Mutation: add a small LoRA to weights in bfloat16, which round it away."""
    with pytest.raises(
        UserError, match=rf"needs a base in float32.*some weights in {kind}, in which"
    ):
        make("lora.compute=merged", *words)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_a_sum_is_refused_where_products_round_it(precision):
    """TF32 has ten bits: a B of 1e-5 would be lost. Mutation: look at the weights' dtype alone."""
    try:
        with pytest.raises(UserError, match=rf"matmul_precision=highest: with {precision} a"):
            make("lora.compute=merged", f"matmul_precision={precision}")
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_quantised_base_takes_products_in_its_dtype():
    """Mutation: ask a quantised layer for its matrix."""
    policy, data, _ = make("lora.compute=base_dtype", "+model.quantization=int8")
    [part, *_] = first_batch(awake(policy), data)
    step = policy.objective.replay(part, 0)
    assert torch.equal(step.mean, part.trajectory.old_mean[:, 0])
    step.mean.sum().backward()
    assert any(value.grad is not None for value in policy.tuning.parameters().values())


def test_a_run_without_the_key_computes_as_it_did():
    """Configurations of earlier runs have none. Mutation: another default."""
    settings = OmegaConf.to_container(composed().lora)
    del settings["compute"]
    recipe = instantiate(settings)
    assert isinstance(recipe, LoRA)
    assert recipe.compute == "adapter"


@pytest.mark.parametrize("compute", OTHERS)
def test_a_run_from_a_lora_is_computed_this_way_too(compute, tmp_path):
    """Mutation: leave the way out where a file is read."""
    plain, _, _ = make()
    awake(plain).tuning.save(plain.model.pipeline, tmp_path)
    start = (f"lora.start={tmp_path}", "lora.rank=null", "lora.alpha=null", "lora.targets=null")
    policy, _, _ = make(*start, f"lora.compute={compute}")
    kinds = {
        type(layer).__name__ for layer in policy.transformer.modules() if hasattr(layer, "lora_A")
    }
    assert kinds == {{"base_dtype": "BaseDtypeLinear", "merged": "MergedLinear"}[compute]}


@pytest.fixture
def walks(monkeypatch):
    """Counts how often the transformer's modules are walked over."""
    counts = []
    plain = nn.Module.named_modules

    def counted(self, *args, **kwargs):
        counts.append(self)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "named_modules", counted)
    return counts


def test_a_reference_term_walks_over_no_modules(walks):
    """A large transformer has thousands. Mutation: look for the layers at every term."""
    policy, _, _ = make()
    layers = [layer for layer in policy.transformer.modules() if hasattr(layer, "lora_A")]
    walks.clear()
    with policy.tuning.at_reference():
        policy.tuning.parameters()
        assert all(layer.disable_adapters for layer in layers)
    assert layers and not any(layer.disable_adapters for layer in layers)
    assert all(value.requires_grad for value in policy.tuning.parameters().values())
    assert not any(module is policy.transformer for module in walks)
