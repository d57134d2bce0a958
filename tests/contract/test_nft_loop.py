"""Diffusion-NFT in the loop on the embedded model."""

import pytest
import torch
from runs import first_batch, make, term_loss

from flowrl.training.metric_means import Record


def nft(*overrides):
    return make("loss=nft", "sampler=ode", "penalty=velocity", *overrides)


def test_nft_draws_and_contrasts_with_the_old_policy():
    """Rollouts are the old weights', bitwise; the contrast is measured against them.

    Mutation: sample under the current weights, or evaluate the old velocity under them.
    """
    policy, data, _ = nft()
    with policy.objective.at_behaviour():
        before = first_batch(policy, data)
    with torch.no_grad():
        for parameter in policy.tuning.parameters().values():
            parameter.add_(0.05)
    with policy.objective.at_behaviour():
        after = first_batch(policy, data)
    assert all(
        torch.equal(a.trajectory.x0, b.trajectory.x0) for a, b in zip(before, after, strict=True)
    )
    record = Record()
    term_loss(policy, before[0], 1, record)
    assert record.means()["trust/velocity_old"] > 1e-4
    policy.objective.follow(policy.num_optimizer_steps)
    policy.objective.old = {
        name: value.clone() for name, value in policy.tuning.parameters().items()
    }
    again = Record()
    term_loss(policy, before[0], 1, again)
    assert again.means()["trust/velocity_old"] == 0


def test_the_old_policy_follows_and_is_kept(tmp_path):
    """After n optimizer steps it keeps min(n / 1000, 1/2) of itself, and a checkpoint restores it
    bitwise.

    Mutation: swap the two weights of the average, or leave `old` out of the checkpoint.
    """
    policy, _, _ = nft()
    start = {name: value.clone() for name, value in policy.objective.old.items()}
    with torch.no_grad():
        for parameter in policy.tuning.parameters().values():
            parameter.add_(1.0)
    policy.num_optimizer_steps = 250
    policy.objective.follow(policy.num_optimizer_steps)
    for name, value in policy.objective.old.items():
        torch.testing.assert_close(value, start[name] + 0.75, rtol=0, atol=1e-6)
    other, _, _ = nft("seed=1")
    other.load_weights({stem: dict(tensors) for stem, tensors in policy.weights().items()})
    assert all(
        torch.equal(other.objective.old[name], policy.objective.old[name])
        for name in policy.objective.old
    )


def test_forward_noise_does_not_depend_on_the_batch():
    """Mutation: draw it from the global generator, or the same for every sigma."""
    whole, parts = nft("batch.max_micro_batch=4"), nft("batch.max_micro_batch=1")
    noises = []
    for policy, data, _ in (whole, parts):
        with policy.objective.at_behaviour():
            batch = first_batch(policy, data)
        noises.append(
            [
                torch.cat(
                    [
                        policy.objective.noise(part, range(len(part.rows)), index, 0)
                        for part in batch
                    ]
                )
                for index in (0, 1)
            ]
        )
    assert torch.equal(noises[0][0], noises[1][0]) and torch.equal(noises[0][1], noises[1][1])
    assert not torch.equal(noises[0][0], noises[0][1])


def test_each_sample_leaves_out_sigmas_of_its_own():
    """int(0.99 x 6) of six, other ones for other samples and inner epochs, whatever the
    micro-batch; only they train.

    Mutation: train the grid's first five, choose for a whole batch, or forget the choice in the
    penalty or the loss.
    """
    (whole, data, _), (parts, others, _) = (
        nft("batch.max_micro_batch=4"),
        nft("batch.max_micro_batch=1"),
    )
    with whole.objective.at_behaviour():
        batch = first_batch(whole, data)
    with parts.objective.at_behaviour():
        singles = first_batch(parts, others)
    chosen = torch.cat(
        [whole.objective.is_trained(part, whole.num_optimizer_steps) for part in batch]
    )
    assert torch.equal(chosen, torch.cat([parts.objective.is_trained(part, 0) for part in singles]))
    assert (chosen.sum(1) == 5).all() and not (chosen == chosen[:1]).all()
    whole.num_optimizer_steps += 1
    assert not torch.equal(
        chosen,
        torch.cat([whole.objective.is_trained(part, whole.num_optimizer_steps) for part in batch]),
    )
    part, own = singles[0], parts.objective.is_trained(singles[0], 0)[0]
    part.advantage, part.is_used = torch.ones(1), torch.ones(1, dtype=torch.bool)
    with torch.no_grad():
        for parameter in parts.tuning.parameters().values():
            parameter.add_(0.05)
    losses = [term_loss(parts, part, index).item() for index in range(6)]
    assert [loss != 0 for loss in losses] == own.tolist()


def test_only_samples_that_train_on_a_sigma_are_evaluated_at_it():
    """Terms of four samples are, in the mean over samples, those of each alone; three networks'
    passes have five rows a sample and not six.

    Mutation: evaluate every row, take the rows of another sigma, or leave out a share.
    """
    # Two prompts in a micro-batch of four samples.
    words = ("batch.group_size=2", "batch.prompts_per_iteration=4")
    whole, data, _ = nft(*words, "batch.max_micro_batch=4")
    parts, others, _ = nft(*words, "batch.max_micro_batch=1")
    with whole.objective.at_behaviour():
        batch = first_batch(whole, data)[0]
    with parts.objective.at_behaviour():
        singles = first_batch(parts, others)[: len(batch.rows)]
    advantages = torch.tensor([0.9, -0.4, 0.3, -0.8])
    batch.advantage, batch.is_used = advantages, torch.ones(4, dtype=torch.bool)
    for single, advantage in zip(singles, advantages, strict=True):
        single.advantage, single.is_used = advantage[None], torch.ones(1, dtype=torch.bool)
    for policy in (whole, parts):
        with torch.no_grad():
            for parameter in policy.tuning.parameters().values():
                parameter.add_(0.05)
    expected = sum(
        term_loss(parts, single, index).item()
        for single in singles
        for index in range(6)
        if parts.objective.num_rows(single, index, 0)
    )
    chosen = whole.objective.is_trained(batch, 1)
    for index in range(6):
        expected_rows = chosen[:, index].nonzero().flatten().tolist()
        assert whole.objective.trained_rows(batch, index, 1) == expected_rows
    num_rows = []
    with whole.transformer.register_forward_pre_hook(
        lambda _, positional, named: num_rows.append(len([*positional, *named.values()][0])),
        with_kwargs=True,
    ):
        losses = [
            term_loss(whole, batch, index).item()
            for index in range(6)
            if whole.objective.num_rows(batch, index, 0)
        ]
    assert sum(losses) == pytest.approx(expected / 4, rel=1e-4)
    assert sum(num_rows) == 3 * 5 * 4
