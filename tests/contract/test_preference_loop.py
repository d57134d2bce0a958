"""Losses that compare samples in the loop on the embedded model."""

from contextlib import nullcontext

import pytest
import torch
from runs import awake, composed, first_batch, fit, make

from flowrl.speed import bare_parts
from flowrl.speed.operations import operations_per_row
from flowrl.training import optimization
from flowrl.training.metric_means import Record
from flowrl.training.optimization import accumulate_gradients

PAIRS = ("loss=flow_dpo", "sampler=ode")
SMALL = ("batch.group_size=4", "batch.prompts_per_iteration=2", "batch.updates_per_iteration=1")
ADVANTAGES = torch.tensor([0.9, -0.4, 0.3, -0.8, 0.2, 0.2, 0.2, 0.2])
"""Of two prompts, of which the second has no pair."""


@pytest.fixture(autouse=True)
def no_trainer(monkeypatch):
    """Gradients are of one process, which needs no strategy."""
    for module in (optimization, bare_parts):
        monkeypatch.setattr(module, "synchronised", lambda *arguments, **options: nullcontext())
    monkeypatch.setattr(optimization, "averages_gradients", lambda policy: False)


def with_rollout(*overrides):
    """A policy away from its reference, and the first iteration's rollout with advantages."""
    policy, data, _ = make(*PAIRS, *SMALL, *overrides)
    with policy.objective.at_behaviour():
        batches = first_batch(policy, data)
    for batch in batches:
        rows = torch.tensor(list(batch.rows))
        batch.advantage = ADVANTAGES[rows]
        batch.is_used = torch.ones(len(rows), dtype=torch.bool)
    return awake(policy), data, batches


def calls_of(policy):
    """The rows of every pass of the network from here on."""
    num_rows = []
    policy.transformer.register_forward_pre_hook(
        lambda _, positional, named: num_rows.append(len([*positional, *named.values()][0])),
        with_kwargs=True,
    )
    return num_rows


def test_samples_of_a_prompt_are_noised_alike_on_the_same_sigmas():
    """Those of other prompts are not; other losses have noise and sigmas of each sample.

    Mutation: draw by sample, or one noise for all prompts.
    """
    policy, _, [batch] = with_rollout()
    noise = policy.objective.noise(batch, range(8), 1, 0)
    assert all(torch.equal(noise[row], noise[0]) for row in range(4))
    assert all(torch.equal(noise[row], noise[4]) for row in range(4, 8))
    assert not torch.equal(noise[0], noise[4])
    chosen = [policy.objective.is_trained(batch, step) for step in range(6)]
    assert all((part[:4] == part[0]).all() and (part[4:] == part[4]).all() for part in chosen)
    assert any((part[0] != part[4]).any() for part in chosen)


def test_only_pairs_are_evaluated_by_the_two_policies_that_are_compared():
    """Samples 0 and 3 of eight, by the current policy and the reference; with `anchor=old` by the
    old one and the current.

    Mutation: evaluate the old policy too, every row, or pairs of equal samples.
    """
    for anchor in ("reference", "old"):
        policy, _, [batch] = with_rollout(f"loss.anchor={anchor}")
        chosen = policy.objective.is_trained(batch, 0)
        for index in range(6):
            expected = [0, 3] if chosen[0, index] else []
            assert policy.objective.trained_rows(batch, index, 0) == expected
        num_rows = calls_of(policy)
        record = Record()
        gradients_of(policy, [batch], record)
        assert num_rows == [2] * 2 * 5
        assert ("trust/velocity_old" in record.means()) == (anchor == "old")


def gradients_of(policy, batches, record=None):
    """The gradient of an update over micro-batches, without a trainer."""
    policy.manual_backward = lambda loss: loss.backward()
    accumulate_gradients(policy, batches, record or Record())
    return [weight.grad for weight in policy.tuning.parameters().values()]


def plain_loss(policy, batch, index):
    """-log sigmoid(-beta/2 (change_w - change_l)) of samples 0 and 3, written down once more."""
    sigma = policy.algorithm.intervals[index].sigma
    rows = torch.tensor([0, 3])
    x0 = batch.trajectory.x0[rows]
    noise = policy.objective.noise(batch, [0, 3], index, 0)
    x = (1 - sigma) * x0 + sigma * noise
    conditioning = batch.conditioned.conditioning(rows)
    target = noise - x0
    velocity = policy.velocity(x, sigma, conditioning)
    reference = policy.reference.velocity(x, sigma, conditioning)
    error = (velocity - target).square().mean((1, 2, 3))
    ref_error = (reference - target).square().mean((1, 2, 3))
    change = error - ref_error
    return -torch.nn.functional.logsigmoid(-50.0 * (change[0] - change[1]))


def test_the_gradient_is_that_of_the_mean_over_prompts():
    """One pair of two prompts: half its mean over the sigmas, which the plain formula gives.

    Mutation: noise of the second sample's own, the mean over all samples, or the anchor under the
    trained weights.
    """
    policy, _, [batch] = with_rollout()
    found = gradients_of(policy, [batch])
    weights = list(policy.tuning.parameters().values())
    chosen = policy.objective.is_trained(batch, 0)[0].nonzero().flatten().tolist()
    total = sum(plain_loss(policy, batch, index) for index in chosen) / len(chosen) / 2
    expected = torch.autograd.grad(total, weights)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6 + 1e-3 * theirs.abs().max())


def test_micro_batches_add_up_to_the_same_gradient():
    """Two of a group each, one of which trains on nothing. Mutation: leave out a share."""
    gradients = []
    for size in (8, 4):
        policy, _, batches = with_rollout(f"batch.max_micro_batch={size}")
        assert len(batches) == 8 // size
        gradients.append(gradients_of(policy, batches))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_an_update_without_a_pair_makes_a_step_of_zero_gradient():
    """Processes meet at an update's last term. Mutation: no term, at which others would wait."""
    policy, _, [batch] = with_rollout()
    batch.advantage = torch.zeros(8)
    found = gradients_of(policy, [batch])
    assert all(gradient is not None and not gradient.any() for gradient in found)


def test_advantages_are_looked_at_anew():
    """The same micro-batch with other advantages has other pairs, as after a rehearsal. Mutation:
    keep the pairs with the sigmas.
    """
    policy, _, [batch] = with_rollout()
    index = int(policy.objective.is_trained(batch, 0)[0].nonzero()[0])
    assert policy.objective.trained_rows(batch, index, 0) == [0, 3]
    batch.advantage = -ADVANTAGES
    assert policy.objective.trained_rows(batch, index, 0) == [0, 3]
    batch.advantage = ADVANTAGES.roll(1)
    assert policy.objective.trained_rows(batch, index, 0)[:1] == [1]


def test_the_current_policy_draws_the_samples():
    """Without a decay the old policy is the current one after each iteration, bitwise. Mutation:
    follow at Diffusion-NFT's pace.
    """
    policy, data, _ = make(*PAIRS, *SMALL, "num_iterations=1")
    start = {name: value.clone() for name, value in policy.objective.old.items()}
    fit(policy, data)
    weights = policy.tuning.parameters()
    assert all(torch.equal(policy.objective.old[name], weights[name]) for name in weights)
    assert any(not torch.equal(start[name], weights[name]) for name in weights)
    assert policy.last_metrics["preference/accuracy"] >= 0


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("batch.max_micro_batch=3",), "batch.max_micro_batch=3: the loss compares the samples"),
        (("batch.updates_per_iteration=4",), "the loss compares the samples of a prompt, so these"),
        (("loss.num_pairs=3",), "loss.num_pairs=3 needs 6 samples"),
        (("sampler=cps",), "loss=flow_dpo needs a deterministic rollout"),
        (("loss.beta=0",), "loss.beta=0"),
        (("loss.anchor=mean",), "loss.anchor"),
    ],
)
def test_what_cannot_be_compared_is_refused(overrides, told):
    """Before anything is loaded, in a line that names the key. Mutation: split groups."""
    with pytest.raises(Exception, match=told):
        make(*PAIRS, *SMALL, *overrides)


def test_micro_batches_are_of_whole_groups():
    """The largest that divides two prompts of six samples, below 11: one group, where other losses
    have 6 too, and of 4 prompts 12 below 13 as well as below 23.

    Mutation: divide the samples.
    """
    sizes = []
    for prompts, most in ((2, 11), (4, 13), (4, 23), (6, 13)):
        policy, _, _ = make(
            *PAIRS,
            "batch.group_size=6",
            f"batch.prompts_per_iteration={prompts}",
            "batch.updates_per_iteration=1",
            f"batch.max_micro_batch={most}",
        )
        sizes.append(policy.plan.micro_batch)
    assert sizes == [6, 12, 12, 12]


def test_the_reference_has_the_guidance_of_the_rollouts():
    """Without a penalty too, since its velocity is compared with the policy's. Mutation: 1, as it
    was where the reference was not asked.
    """
    cfg = composed(*PAIRS, "rollout.guidance_scale=3.5")
    assert cfg.penalty.beta == 0 and cfg.penalty.guidance_scale == 3.5
    assert cfg.algorithm.training_guidance_scale == 3.5
    cfg = composed(*PAIRS, "rollout.guidance_scale=3.5", "rollout.training_guidance_scale=1")
    assert cfg.algorithm.guidance_scale == 3.5 and cfg.penalty.guidance_scale == 1


GUIDED = ("model.has_guidance=true", "rollout.guidance_scale=3")
UNGUIDED_UPDATES = (*GUIDED, "rollout.training_guidance_scale=1")


def test_rollouts_with_guidance_may_train_without():
    """As flow_grpo's DPO and DGPO do: images are those of guided rollouts, and an update's loss is
    that of velocities without guidance, of the policy, the old one and the reference.

    Mutation: draw without guidance, or guide one of the three in updates.
    """
    for method in ((), ("loss=dgpo", "penalty=velocity", "penalty.beta=0.5")):
        policy, _, [batch] = with_rollout(*UNGUIDED_UPDATES, *method)
        _, _, [guided] = with_rollout(*GUIDED, *method)
        assert torch.equal(batch.trajectory.x0, guided.trajectory.x0)
        plain, _, [other] = with_rollout("model.has_guidance=true", *method)
        assert not torch.equal(other.trajectory.x0, guided.trajectory.x0)
        index = next(k for k in range(6) if policy.objective.trained_rows(batch, k, 0))
        num_rows = calls_of(policy)
        output = policy.objective.term(batch, index, 0)
        count = len(policy.objective.trained_rows(batch, index, 0))
        assert num_rows == [count] * len(num_rows) and len(num_rows) >= 2
        expected = plain.objective.term(batch, index, 0)
        assert output.loss.item() == expected.loss.item() != 0


def test_the_parts_of_an_iteration_have_the_guidance_of_each():
    """Twice the rows in rollouts alone, for the clock and for the operations. Mutation: time or
    count updates at the rollouts' scale.
    """
    policy, data, _ = make("loss=nft", "sampler=ode", *SMALL, *UNGUIDED_UPDATES)
    parts = bare_parts.BareParts(policy, data.iterations[0])
    num_rows = calls_of(policy)
    parts.rollout()
    assert num_rows == [16] * 6
    parts.update()
    assert num_rows[6:] == [8] * 10
    cost = operations_per_row(parts)
    alone = make("loss=nft", "sampler=ode", *SMALL, "model.has_guidance=true")
    unguided = operations_per_row(bare_parts.BareParts(alone[0], alone[1].iterations[0]))
    assert cost["update"] == unguided["update"] and cost["rollout"] > 1.5 * unguided["rollout"]


def test_the_bare_parts_are_those_of_an_iteration():
    """Five sigmas by the current policy and the reference; no old policy. Mutation: time the old
    policy of a loss that does not ask it, or no reference without a penalty.
    """
    policy, data, _ = make(*PAIRS, *SMALL)
    parts = bare_parts.BareParts(policy, data.iterations[0])
    num_rows = calls_of(policy)
    parts.update()
    assert num_rows == [8] * 5
    parts.reference()
    assert num_rows == [8] * 10
