"""Stochastic and trained steps may differ between groups and samples."""

from contextlib import nullcontext

import pytest
import torch
from runs import SMALL, awake, make, put, term_loss

from flowrl.errors import UserError
from flowrl.gaussian import GaussianStep
from flowrl.objectives import check_method
from flowrl.samplers.steps import AllButLast
from flowrl.training import optimization, sampling
from flowrl.training.batch_plan import BatchPlan
from flowrl.training.metric_means import Record
from flowrl.training.sampling import sample_update


def in_one_process(monkeypatch):
    """Let updates run without a Trainer, whose strategy says how processes meet."""
    monkeypatch.setattr(optimization, "synchronised", lambda *arguments, **options: nullcontext())
    monkeypatch.setattr(optimization, "averages_gradients", lambda policy: False)


class ByPrompt:
    """Every second prompt trains on another step."""

    def candidates(self, num_steps):
        return (1, 2)

    def draw(self, num_steps, iteration, seed, prompt):
        return (1 + prompt % 2,)


def test_stochastic_steps_may_differ_between_groups(monkeypatch):
    """Micro-batches of several prompts are divided, and the mean is still one over samples.

    Mutation: draw for a micro-batch's first prompt alone, or weight unequal pieces alike.
    """
    overrides = (*SMALL, "batch.group_size=6", "loss=grpo", "loss.clip_low=1", "loss.clip_high=inf")
    policy, data, _ = make(*overrides)
    put(policy, steps=ByPrompt())
    batch = next(iter(data.iterations))
    sampled = sample_update(policy, batch, 0, policy.plan.updates(0)[0])
    for micro_batch in sampled:
        steps = {1 + row // policy.plan.group_size % 2 for row in micro_batch.rows}
        assert micro_batch.trajectory.steps == tuple(steps)
        micro_batch.advantage = torch.arange(len(micro_batch.rows)) + 1.0
    sizes = [len(micro_batch.rows) for micro_batch in sampled]
    assert sum(sizes) == policy.plan.num_samples and len(set(sizes)) > 1
    losses = [term_loss(policy, micro_batch, 0).item() for micro_batch in sampled]
    taken = []
    policy.manual_backward = lambda loss: taken.append(loss.item())
    in_one_process(monkeypatch)
    optimization.accumulate_gradients(policy, sampled, Record())
    expected = [loss * size / sum(sizes) for loss, size in zip(losses, sizes, strict=True)]
    assert taken == pytest.approx(expected, rel=1e-6)


DANCE = ("loss=grpo", "loss.clip_low=1", "loss.clip_high=inf", "steps=all_but_last")


def trained_pairs(policy, parts):
    """Pairs of a micro-batch and a row of it, by the step that the row trains on."""
    pairs = {}
    share = policy.algorithm.trained
    stochastic = policy.objective.stochastic_steps(0, 0)
    for part in parts:
        for place, row in enumerate(part.rows):
            prompt, sample = divmod(row, policy.plan.group_size)
            for number in share.draw(stochastic, 0, policy.seed, prompt, sample):
                pairs.setdefault(number, []).append((part, place))
    return pairs


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("penalty", [(), ("penalty=mean_squared", "penalty.beta=100")])
def test_untrained_pairs_give_no_gradient(size, penalty, monkeypatch):
    """Noise in every step but the last, and each sample trains on a random share of them: the
    gradient is that of the mean over trained pairs of a sample and a step, in whatever
    micro-batches, and no pass is made for a step that no sample of a micro-batch trains on.

    Mutation: train on untrained pairs, take the mean over all pairs, weight micro-batches' means of
    different numbers alike, or leave the penalty's mean as it was.
    """
    micro_batch = f"batch.max_micro_batch={size}"
    words = (*SMALL, *DANCE, "trained=random_share", micro_batch, *penalty)
    policy, data, _ = make(*words)
    batch = next(iter(data.iterations))
    parts = sample_update(policy, batch, 0, policy.plan.updates(0)[0])
    awake(policy)
    for part in parts:
        part.advantage = torch.tensor([(row % 5) - 1.5 for row in part.rows])
    pairs = trained_pairs(policy, parts)
    num_pairs = sum(map(len, pairs.values()))
    assert num_pairs == 3 * policy.plan.num_samples
    total = 0.0
    for number, members in pairs.items():
        for part, place in members:
            index = part.trajectory.steps.index(number)
            step = policy.objective.replay(part, index)
            likelihood = policy.algorithm.likelihood
            old_step = GaussianStep(part.trajectory.old_mean[:, index], step.std)
            drawn = part.trajectory.x_next[:, index]
            log_ratio = likelihood.log_prob(step, drawn) - likelihood.log_prob(old_step, drawn)
            ratio = log_ratio[place].exp()
            term = -part.advantage[place] * ratio
            if penalty:
                term = term + 100 * policy.objective._distance(part, step, index)[place]
            total = total + term / num_pairs
    parameters = list(policy.tuning.parameters().values())
    expected = torch.autograd.grad(total, parameters)
    passes = []
    replay = policy.objective.replay

    def counted(part, index):
        passes.append(index)
        return replay(part, index)

    monkeypatch.setattr(policy.objective, "replay", counted)
    policy.manual_backward = lambda loss: loss.backward()
    in_one_process(monkeypatch)
    record = Record()
    optimization.accumulate_gradients(policy, parts, record)
    for ours, theirs in zip(parameters, expected, strict=True):
        size_of = theirs.abs().max().item()
        torch.testing.assert_close(ours.grad, theirs, rtol=1e-4, atol=1e-4 * size_of)
    # One pass for each micro-batch and step that a sample of it trains on.
    assert len(passes) == len({(id(part), k) for k in pairs for part, _ in pairs[k]})
    # The metrics are means over trained pairs, too.
    kept = [
        weight
        for (name, _), values in record.values.items()
        for _, weight in values
        if name == "trust/kl_old"
    ]
    assert sum(kept) == num_pairs


def test_terms_that_nobody_trains_on_are_passes_where_processes_wait(monkeypatch):
    """With divided weights every term is a pass, and gives no gradient where no sample trains on
    it. Mutation: skip it there, too, or take the mean of nothing, which is NaN.
    """
    words = (*SMALL, *DANCE, "trained=random_share", "batch.max_micro_batch=1")
    policy, data, _ = make(*words)
    batch = next(iter(data.iterations))
    parts = sample_update(policy, batch, 0, policy.plan.updates(0)[0])
    taken = []
    policy.manual_backward = lambda loss: taken.append(loss.detach())
    in_one_process(monkeypatch)
    monkeypatch.setattr(optimization, "is_divided", lambda transformer: True)
    optimization.accumulate_gradients(policy, parts, Record())
    assert len(taken) == 5 * policy.plan.num_samples
    assert torch.stack(taken).isfinite().all()


def test_samples_that_train_on_different_numbers_of_steps_are_refused():
    """Mutation: take any."""

    class Uneven:
        def candidates(self, stochastic):
            return stochastic

        def draw(self, stochastic, iteration, seed, prompt, sample):
            return stochastic[: 1 + sample % 2]

    class Other(Uneven):
        def draw(self, stochastic, iteration, seed, prompt, sample):
            return (7,)

    policy, data, _ = make(*SMALL, *DANCE)
    put(policy, trained=Uneven())
    batch = next(iter(data.iterations))
    part = sample_update(policy, batch, 0, policy.plan.updates(0)[0])[0]
    with pytest.raises(UserError, match=r"trained: samples train on \[1, 2\] steps"):
        policy.objective.term(part, 0, 0)
    put(policy, trained=Other())
    with pytest.raises(UserError, match=r"trained: \(7,\) were drawn of"):
        check_method(policy.algorithm)


def test_only_steps_that_may_be_trained_need_a_density():
    """Noise in all but the last step, of which CPS's later ones may be too quiet to train on.

    Mutation: ask it of every stochastic step.
    """

    class First:
        def candidates(self, stochastic):
            return stochastic[:1]

        def draw(self, stochastic, iteration, seed, prompt, sample):
            return stochastic[:1]

    policy, _, _ = make(
        *SMALL, "sampler=cps", "sampler.noise_level=0.02", "steps.high=1", "steps.count=1"
    )
    put(policy, steps=AllButLast())
    with pytest.raises(UserError, match="zero-variance"):
        check_method(policy.algorithm)
    put(policy, trained=First())
    check_method(policy.algorithm)


class LaterPromptsDiffer:
    """Prompts 0 and 1 train on step 1, later ones alternate between steps 1 and 2."""

    def candidates(self, num_steps):
        return (1, 2)

    def draw(self, num_steps, iteration, seed, prompt):
        return (1,) if prompt < 2 else (1 + prompt % 2,)


def test_sharded_weights_refuse_processes_that_make_unequal_passes(monkeypatch):
    """Two processes with two prompts each: the first makes one pass, the second two, and each of
    them knows it beforehand.

    Mutation: let them wait for each other.
    """
    policy, data, _ = make(*SMALL, "batch.prompts_per_iteration=4")
    put(policy, steps=LaterPromptsDiffer())
    policy.plan = BatchPlan(
        prompts_per_iteration=4,
        group_size=2,
        updates_per_iteration=1,
        inner_epochs=1,
        max_micro_batch=4,
        num_processes=2,
    )
    monkeypatch.setattr(sampling, "is_divided", lambda transformer: True)
    batch = next(iter(data.iterations))
    for rank in (0, 1):
        with pytest.raises(UserError, match="trainer=fsdp: processes would make different numbers"):
            sample_update(policy, batch, 0, policy.plan.updates(rank)[0])
    monkeypatch.setattr(sampling, "is_divided", lambda transformer: False)
    assert len(sample_update(policy, batch, 0, policy.plan.updates(0)[0])) == 1
    assert len(sample_update(policy, batch, 0, policy.plan.updates(1)[0])) == 2
