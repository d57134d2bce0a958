"""A LoRA on a quantised base: rollouts are reproduced, the base stays, and the export is loaded by
stock pipelines.
"""

import pytest
import torch
from hydra.utils import instantiate
from runs import awake, composed, first_batch, fit, make
from safetensors.torch import load_file
from tiny import FAMILIES

from flowrl.cli.memory_plan import Plan
from flowrl.errors import UserError
from flowrl.models.quantization import KINDS, QuantizedLinear
from flowrl.types import RewardOutput

OTHERS = [("sd3", "nf4"), ("flux1", "int8"), ("flux2_klein", "int8")]
"""Families and kinds whose runs are slow tests."""


class Brightness:
    """A reward that random images differ in."""

    def __call__(self, images, prompts):
        values = images.float().mean((1, 2, 3))
        return RewardOutput(values, torch.ones(len(prompts), dtype=torch.bool))


def settings(name, tiny_pipelines, kind):
    """A run on a family's small pipeline, quantised."""
    return [*FAMILIES[name].overrides(tiny_pipelines[name]), f"model.quantization={kind}"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "is_checkpointed"),
    [
        ("float32", False),
        ("bfloat16", True),
        pytest.param("float32", True, marks=pytest.mark.slow),
        pytest.param("bfloat16", False, marks=pytest.mark.slow),
    ],
)
def test_a_replay_is_bitwise(kind, dtype, is_checkpointed):
    """In the network's dtype, with gradients and without, for LoRA weights away from zero: ratio 1.

    Mutation: restore the weights otherwise where no gradient is asked for.
    """
    policy, data, _ = make(f"+model.quantization={kind}", f"model.dtype={dtype}")
    if is_checkpointed:
        policy.transformer.enable_gradient_checkpointing()
    for part in first_batch(awake(policy), data):
        for index in range(len(part.trajectory.steps)):
            step = policy.objective.replay(part, index)
            assert step.mean.requires_grad
            assert torch.equal(step.mean, part.trajectory.old_mean[:, index])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sd3", "int8"),
        ("flux1", "nf4"),
        ("flux2_klein", "nf4"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS),
    ],
)
def test_training_moves_lora_alone_and_its_export_is_loaded(name, kind, tiny_pipelines, tmp_path):
    """Two iterations: every layer with LoRA lies on a quantised one, the LoRA moves in float32, the
    bits stay, and the stock pipeline, which is not quantised, loads the export weight by weight.

    Mutation: train in the base's dtype, or save the base's layers under other names.
    """
    policy, data, _ = make(
        *settings(name, tiny_pipelines, kind), "optimizer.lr=1e-2", "optimizer.eps=1e-15"
    )
    policy.reward.reward = Brightness()
    own = policy.tuning.parameters()
    modules = dict(policy.transformer.named_modules())
    adapted = {key.split(".lora_")[0] for key in own}
    assert all(isinstance(modules[layer].base_layer, QuantizedLinear) for layer in adapted)
    before = {key: value.clone() for key, value in policy.transformer.state_dict().items()}
    fit(policy, data)
    after = policy.transformer.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before if key not in own)
    assert all(value.dtype == torch.float32 for value in own.values())
    moved = {key for key in own if "lora_B" in key and not torch.equal(before[key], after[key])}
    assert len(moved) == len(own) // 2 - FAMILIES[name].num_idle

    policy.tuning.save(policy.model.pipeline, tmp_path)
    stock = FAMILIES[name].stock.from_pretrained(tiny_pipelines[name])
    stock.load_lora_weights(tmp_path, adapter_name="policy")
    loaded = dict(stock.transformer.named_parameters())
    for key, value in own.items():
        assert torch.equal(loaded[key], value.detach()), key
    (file,) = tmp_path.glob("*.safetensors")
    assert len(load_file(file)) == len(own)


def test_a_run_goes_on_from_a_lora_of_a_plain_base(tiny_pipelines, tmp_path):
    """And the other way round: layers are compared by their sizes, not by their bits.

    Mutation: compare with the shape of the quantised weight.
    """
    plain, _, _ = make(*FAMILIES["sd3"].overrides(tiny_pipelines["sd3"]))
    awake(plain).tuning.save(plain.model.pipeline, tmp_path)
    start = (f"lora.start={tmp_path}", "lora.rank=null", "lora.alpha=null", "lora.targets=null")
    policy, _, _ = make(*settings("sd3", tiny_pipelines, "nf4"), *start)
    for key, value in plain.tuning.parameters().items():
        assert torch.equal(policy.tuning.parameters()[key], value)


def test_all_weights_cannot_be_trained():
    """Said before anything is drawn. Mutation: train what the bits are."""
    with pytest.raises(UserError, match=r"quantised ones cannot be trained: set model\.quantiz"):
        make("tuning=full", "+model.quantization=int8")


def test_a_plan_counts_the_bits():
    """SD3.5 Medium in bfloat16, 2.5 billion weights, of which blocks hold nearly all.

    Mutation: plan the weights as they are released.
    """
    sizes = {}
    for kind in (None, *KINDS):
        quantized = [] if kind is None else [f"model.quantization={kind}"]
        cfg = composed("experiment=flow_grpo_sd35", *quantized)
        sizes[kind] = Plan(cfg).weights()["frozen weights"] / 2**30
    assert sizes[None] == pytest.approx(4.6, abs=0.1)
    assert sizes["int8"] == pytest.approx(sizes["fp8"], rel=1e-3)
    assert 0.5 < sizes["int8"] / sizes[None] < 0.56
    assert 0.28 < sizes["nf4"] / sizes[None] < 0.36


def test_the_check_of_a_derived_model_is_made_anew_for_other_bits(tiny_pipelines):
    """Its texts are embedded alike. Mutation: leave the bits out of what a record is known by."""
    call = "{height: 32, width: 32, max_sequence_length: 80}"
    words = ["model=derived", f"model.pretrained={tiny_pipelines['sd3']}", f"model.call={call}"]
    words.append("model.dtype=float32")
    plain = instantiate(composed(*words).model)
    quantized = instantiate(composed(*words, "model.quantization=int8").model)
    assert plain.identity != quantized.identity
    assert plain.embedding_key == quantized.embedding_key
