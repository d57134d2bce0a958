"""DRaFT in the loop on the embedded model and its learned reward."""

from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch
from hydra.utils import instantiate
from runs import awake, composed, first_batch, fit, make, put, term_loss
from torch import nn
from toys import derive

from flowrl.errors import UserError
from flowrl.launch.build import prepare
from flowrl.launch.gradients import check_single
from flowrl.models.experts import as_one
from flowrl.models.protocol import FlowModel, TextModel
from flowrl.objectives.gate import GateFailed
from flowrl.training.graph import require_graph
from flowrl.training.metric_means import Record
from flowrl.training.scoring import assign_advantages
from flowrl.types import RewardOutput

SMALL = ("num_iterations=1", "batch.updates_per_iteration=1", "batch.max_micro_batch=8")
DRAFT = ("loss=draft", "sampler=ode", "reward=shapes_proxy")


def draft(*overrides):
    policy, data, _ = make(*SMALL, *DRAFT, *overrides)
    return awake(policy), data


def gradients(policy, batch, index=0):
    """The gradient of a term's loss in each trained weight."""
    loss = term_loss(policy, batch, index)
    weights = policy.tuning.parameters()
    found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    return loss.detach(), dict(zip(weights, found, strict=True))


def written_out(policy, batch, last_steps):
    """The same by a plain loop: networks and scorer called as their libraries have it."""
    grid = policy.algorithm.intervals
    text = batch.conditioned.conditioning().tensors
    x = batch.trajectory.x[:, 0]
    for interval in grid[-last_steps:]:
        times = torch.full((len(x),), 1000 * interval.sigma)
        v = policy.transformer(x, text["tokens"], text["pooled"], times, return_dict=False)[0]
        x = x + (interval.sigma_next - interval.sigma) * v
    vae = policy.model.vae
    z = x / vae.config.scaling_factor + vae.config.shift_factor
    images = ((vae.decode(z).sample + 1) / 2).clamp(0, 1)
    proxy = policy.reward.reward.trained["proxy"]
    return -proxy.score_with_graph(images, batch.prompts).mean()


@pytest.mark.parametrize("last_steps", [1, 3, 6])
def test_the_gradient_is_autograds_through_the_plain_loop(last_steps):
    """And the rollout's sample is reached again bitwise; only the trained weights have a gradient.

    Mutation: begin at another step, detach the images, or score what the rollout decoded.
    """
    policy, data = draft(f"loss.last_steps={last_steps}")
    [batch] = first_batch(policy, data)
    assert batch.trajectory.steps == (6 - last_steps,)
    loss, found = gradients(policy, batch)
    expected = written_out(policy, batch, last_steps)
    weights = policy.tuning.parameters()
    wanted = torch.autograd.grad(expected, list(weights.values()), allow_unused=True)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    for (name, gradient), other in zip(found.items(), wanted, strict=True):
        assert (gradient is None) == (other is None), name
        if other is not None:
            torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-6, msg=name)
    field = batch.conditioned.field(policy.velocity)
    x0, _ = policy.objective.finish(field, batch.trajectory.x[:, 0].contiguous(), 6 - last_steps)
    assert torch.equal(x0.detach(), batch.trajectory.x0)
    term_loss(policy, batch, 0).backward()
    frozen = [policy.model.vae, policy.reward.reward]
    assert not any(weight.requires_grad for module in frozen for weight in module.parameters())


def test_the_gradient_is_the_rewards_slope():
    """Along itself, by differences of the very reward that is logged, but for 8 bits: all six
    steps, where every weight counts. Mutation: a sign, or a step without a gradient.
    """
    policy, data = draft("loss.last_steps=6")
    [batch] = first_batch(policy, data)
    _, found = gradients(policy, batch)
    slope = sum(g.square().sum().item() for g in found.values() if g is not None)
    length = 3e-3 / slope
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for name, weight in policy.tuning.parameters().items():
                if found[name] is not None:
                    # From the middle up, and then down to as far below it.
                    weight.add_((1 if sign > 0 else -2) * length * found[name])
            values.append(term_loss(policy, batch, 0).item())
    assert values[0] - values[1] == pytest.approx(2 * 3e-3, rel=5e-2)


@pytest.mark.parametrize(
    ("overrides", "tolerance"),
    [
        (("backend.gradient_checkpointing=true",), 1e-6),
        (("batch.max_micro_batch=1",), 1e-5),
        (("lora.compute=merged",), 1e-4),
    ],
)
def test_how_it_is_computed_does_not_matter(overrides, tolerance):
    """Recomputed, one sample at a time, or with merged layers. Mutation: recompute from a state
    that has moved, or another noise for another batch.
    """
    sums = []
    for words in ((), overrides):
        policy, data = draft("loss.last_steps=2", *words)
        batches = first_batch(policy, data)
        total = {}
        for batch in batches:
            for name, gradient in gradients(policy, batch)[1].items():
                if gradient is not None:
                    total[name] = total.get(name, 0) + gradient * len(batch.rows) / 8
        sums.append(total)
    assert sums[0].keys() == sums[1].keys()
    for name, value in sums[0].items():
        scale = value.abs().max().item()
        torch.testing.assert_close(sums[1][name], value, rtol=0, atol=tolerance + 1e-2 * scale)
    whole, other = (torch.cat([v.flatten() for v in one.values()]) for one in sums)
    assert torch.cosine_similarity(whole, other, 0) > 1 - 1e-4


def test_all_weights_may_be_trained():
    """With tuning=full each weight that the last step reaches has a gradient. Mutation: freeze."""
    policy, data, _ = make(*SMALL, *DRAFT, "tuning=full")
    [batch] = first_batch(policy, data)
    _, found = gradients(policy, batch)
    reached = [name for name, gradient in found.items() if gradient is not None and gradient.any()]
    assert len(reached) > 0.9 * len(found)


def test_the_gate_stops_other_weights():
    """Mutation: no gate."""
    policy, data = draft("gate_tolerance=0")
    [batch] = first_batch(policy, data)
    policy.objective.check_gate(batch)
    with torch.no_grad():
        for weight in policy.tuning.parameters().values():
            weight.mul_(1.01)
    with pytest.raises(GateFailed, match="step 5"):
        policy.objective.check_gate(batch)


def test_one_sample_a_prompt_is_enough():
    """DRaFT's natural batch: it trains, and counts as having learned; a loss that compares samples
    needs two. Mutation: ask for groups or advantages, of which the loss has none.
    """
    lone = ("batch.prompts_per_iteration=8", "batch.group_size=1")
    policy, data = draft(*lone)
    before = {name: value.detach().clone() for name, value in policy.tuning.parameters().items()}
    fit(policy, data)
    assert policy.last_metrics["advantage/dropped_groups"] == 1
    after = policy.tuning.parameters()
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    policy.learning.check(1)
    with pytest.raises(UserError, match=r"batch\.group_size=1 must be at least 2: advantages"):
        prepare(composed("debug=smoke", *lone))


def test_a_sample_is_used_whatever_became_of_the_others():
    """Of two samples a prompt one is missing, or the reward judges none of them; a loss that
    compares samples uses none of these four.

    Mutation: leave out a sample whose sibling is missing, or use one that nothing judges.
    """
    policy, data = draft("batch.prompts_per_iteration=4", "batch.group_size=2")
    [batch] = first_batch(policy, data)
    rewards = torch.tensor([[1.0], [2.0], [3.0], [3.0], [torch.nan], [torch.nan], [5.0], [6.0]])
    is_valid = torch.tensor([True, False, True, True, True, True, True, True])
    output = RewardOutput(
        values=rewards[:, 0],
        is_valid=is_valid,
        terms=rewards,
        applies=~rewards.isnan(),
    )
    used = {}
    for loss in (policy.algorithm.loss, instantiate(composed("loss=nft", "sampler=ode").loss)):
        batch.score = Future()
        batch.score.set_result(output)
        put(policy, loss=loss)
        policy.reward.max_missing = 0.5
        assign_advantages(policy, [batch], Record())
        used[loss.name] = batch.is_used.tolist()
    assert used["draft"] == [True, False, True, True, False, False, True, True]
    assert used["nft"] == [False, False, True, True, False, False, True, True]


REFUSED = {
    "a reward without a gradient": (("reward=shapes",), r"ShapesReward \(reward\).*pickscore"),
    "one of a mixture": (
        ("reward=shapes_jpeg",),
        r"(ShapesReward|JPEG) \(reward\.rewards\.\w+\) has no gradient",
    ),
    "divided weights": (
        ("trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2"),
        "trainer=fsdp.*loss=draft.*trainer=ddp",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_do_is_refused_before_weights_load(case, monkeypatch):
    """Mutation: ask at the first update, after the model has loaded."""
    overrides, message = REFUSED[case]
    cfg = composed(*DRAFT, *overrides, "debug=smoke")
    with pytest.raises(UserError, match=message) as error:
        prepare(cfg)
    assert "\n" not in str(error.value)


def test_an_adapter_without_a_graph_is_refused():
    """Mutation: decode without a graph, which leaves the weights without a gradient."""
    policy, _ = draft()
    require_graph(policy.model)
    names = {name for name in dir(FlowModel) if not name.startswith("_")}
    names |= FlowModel.__annotations__.keys() | TextModel.__annotations__.keys()
    plain = SimpleNamespace(**{name: getattr(policy.model, name) for name in names})
    with pytest.raises(UserError, match="SimpleNamespace has no decode_with_graph"):
        require_graph(plain)


def test_several_networks_are_refused():
    """The last steps would train one of them. Mutation: train that one and say nothing."""
    loss = instantiate(composed(*DRAFT, "debug=smoke").loss)
    one = nn.Linear(1, 1)
    check_single(loss, as_one({"transformer": one}))
    two = as_one({"transformer": one, "transformer_2": nn.Linear(1, 1)})
    with pytest.raises(UserError, match=r"loss=draft.*the pipeline has 2"):
        check_single(loss, two)


def test_a_derived_model_decodes_with_a_graph(monkeypatch):
    """Half the latents in three channels of eight pixels, of which the third is the first's. A
    plain decoding has none. Mutation: keep the call's no_grad.
    """
    model = derive(monkeypatch)
    x0 = torch.tensor([[0.5, 1.0]], requires_grad=True)
    images = model.decode_with_graph(x0)
    (gradient,) = torch.autograd.grad(images.sum(), x0)
    assert gradient.tolist() == [[8.0, 4.0]]
    plain = model.decode(x0)
    assert torch.equal(plain, images) and not plain.requires_grad
