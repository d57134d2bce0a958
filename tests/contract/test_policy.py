"""What the loop promises on the embedded model: ratio 1, gradients to LoRA only, a reference that
is the base.
"""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from runs import awake, first_batch, fit, make, term_loss

from flowrl.objectives.micro_batch import ConditionedRows
from flowrl.training.reward import TooManyMissingRewards
from flowrl.types import RewardOutput

GUIDED = ("model.has_guidance=true", "rollout.guidance_scale=3")
LEGAL = [
    ("cps", "dppo", "gaussian"),
    ("cps", "grpo", "gaussian"),
    ("cps", "cps", "unnormalised"),
    ("flow_sde", "dppo", "gaussian"),
    ("flow_sde", "grpo", "gaussian"),
    ("flow_sde", "guard", "gaussian"),
    ("dance_sde", "dppo", "gaussian"),
    ("dance_sde", "grpo", "gaussian"),
]


def ways(*fast):
    """Guidance, checkpointing and rows in all combinations, of which those not in `fast` are slow
    tests.
    """
    names = {"plain": (), "guided": GUIDED}
    for name, is_checkpointed, rows in itertools.product(names, (False, True), (1, 4)):
        marks = () if (name, is_checkpointed, rows) in fast else pytest.mark.slow
        words = f"{name}-{is_checkpointed}-{rows}"
        yield pytest.param(names[name], is_checkpointed, rows, marks=marks, id=words)


WAY = ("guidance", "is_checkpointed", "micro_batch")
PLAIN, WITH_ALL = ("plain", False, 1), ("guided", True, 4)


@pytest.mark.parametrize(WAY, ways(PLAIN, WITH_ALL, ("plain", True, 1), ("guided", False, 4)))
@pytest.mark.parametrize("sampler", ["cps", "flow_sde", "dance_sde"])
def test_replay_of_a_fresh_rollout_is_bitwise(sampler, guidance, is_checkpointed, micro_batch):
    """Ratio 1 and divergence 0 before the first update, with gradients on, for LoRA weights away
    from zero.

    Mutation: replay at sigma_next, with the next stochastic step's state, or without guidance.
    """
    policy, data, _ = make(f"sampler={sampler}", f"batch.max_micro_batch={micro_batch}", *guidance)
    if is_checkpointed:
        awake(policy).transformer.enable_gradient_checkpointing()
    for part in first_batch(awake(policy), data):
        for index in range(len(part.trajectory.steps)):
            step = policy.objective.replay(part, index)
            old_mean = part.trajectory.old_mean[:, index]
            assert step.mean.requires_grad
            assert torch.equal(step.mean, old_mean)
            x_next = part.trajectory.x_next[:, index]
            assert not policy.algorithm.likelihood.log_ratio(step, old_mean, x_next).any()


@pytest.mark.parametrize(WAY, ways(PLAIN, WITH_ALL))
@pytest.mark.parametrize(("sampler", "loss", "form"), LEGAL)
def test_the_first_gradient_is_the_policy_gradient(
    sampler, loss, form, guidance, is_checkpointed, micro_batch
):
    """At the rollout's weights every ratio loss has the gradient of -mean(A log_prob); guard's is
    std / -dt of it.

    Mutation: weight the loss, let the clip or the mask bite at ratio 1, or lose the gradient under
    checkpointing.
    """
    policy, data, _ = make(
        f"sampler={sampler}", f"loss={loss}", f"batch.max_micro_batch={micro_batch}", *guidance
    )
    if is_checkpointed:
        policy.transformer.enable_gradient_checkpointing()
    parts = first_batch(awake(policy), data)[: 4 // micro_batch]
    assert policy.algorithm.likelihood.form == form
    losses, log_probs, advantages = [], [], torch.tensor([1.0, -2.0, 0.5, 3.0])
    for part, advantage in zip(parts, advantages.split(micro_batch), strict=True):
        part.advantage = advantage
        losses.append(term_loss(policy, part, 0))
        step = policy.objective.replay(part, 0)
        log_probs.append(policy.algorithm.likelihood.log_prob(step, part.trajectory.x_next[:, 0]))
    interval = policy.algorithm.intervals[part.trajectory.steps[0]]
    weight = step.std / -interval.dt if loss == "guard" else 1.0
    parameters = list(policy.tuning.parameters().values())
    got = torch.autograd.grad(torch.stack(losses).mean(), parameters, allow_unused=True)
    expected = torch.autograd.grad(
        -weight * (advantages * torch.cat(log_probs)).mean(), parameters, allow_unused=True
    )
    size = max(theirs.abs().max().item() for theirs in expected if theirs is not None)
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * size)


def test_gate_stops_a_run_whose_replay_drifts():
    """Old means of 1e-5 more have a KL near 1e-10, which the tolerance allows, and log-ratios of
    some 1e-6, which it does not; a state drawn elsewhere changes nothing where the means are equal.

    Mutation: compare the drift with `<` the wrong way round, or never call the gate.
    """
    policy, data, _ = make()
    part = first_batch(policy, data)[0]
    policy.objective.check_gate(part)
    part.trajectory.old_mean.add_(1e-5)
    with pytest.raises(RuntimeError, match="gate_tolerance"):
        policy.objective.check_gate(part)


@pytest.mark.parametrize("loss", ["grpo", "dppo", "nft"])
def test_base_is_untouched_and_gradients_reach_lora_only(loss):
    """Mutation: leave the base's requires_grad on, or hand all parameters to the optimizer."""
    policy, data, _ = make(
        f"loss={loss}", f"sampler={'ode' if loss == 'nft' else 'cps'}", "num_iterations=1"
    )
    own = policy.tuning.parameters()
    before = {name: p.detach().clone() for name, p in policy.transformer.named_parameters()}
    assert {
        name for name, p in policy.transformer.named_parameters() if p.requires_grad
    } == own.keys()
    assert all(p.dtype == torch.float32 for p in own.values())
    fit(policy, data)
    after = dict(policy.transformer.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before if name not in own)
    # The last block discards the text stream's attention output: its text query has no gradient, A
    # only decays.
    unused = {"transformer_blocks.2.attn.add_q_proj.lora_B.policy.weight"}
    assert {name for name in own if torch.equal(before[name], after[name])} == unused
    assert set(dict(policy.named_parameters())) == {f"transformer.{name}" for name in after}


def test_reference_is_the_base_model():
    """Mutation: run the reference with the adapter on."""
    policy, data, _ = make()
    part = first_batch(policy, data)[0]
    x = part.trajectory.x0
    conditioning = part.conditioned.conditioning()
    base = policy.velocity(x, 0.5, conditioning).detach()
    with torch.no_grad():
        for parameter in policy.tuning.parameters().values():
            parameter.add_(0.1)
    assert not torch.allclose(policy.velocity(x, 0.5, conditioning), base, atol=1e-3)
    assert torch.equal(policy.reference.velocity(x, 0.5, conditioning), base)
    assert not torch.allclose(policy.velocity(x, 0.5, conditioning), base, atol=1e-3)


def test_guidance_combines_both_predictions():
    """v = v_negative + g (v_positive - v_negative); at g = 1 the unguided pass. Mutation: swap the
    chunks.
    """
    policy, _, evaluator = make("model.has_guidance=true")
    conditioning = policy.embed(evaluator.prompts[:3])
    x = torch.randn(3, *policy.model.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        positive = policy.model.velocity(x, 0.7, conditioning, 1.0)
        negative = policy.model.velocity(x, 0.7, conditioning.negative, 1.0)
        guided = policy.model.velocity(x, 0.7, conditioning, 3.0)
    torch.testing.assert_close(guided, negative + 3 * (positive - negative), rtol=1e-4, atol=1e-5)
    assert (positive - negative).abs().max() > 1e-2


def test_evaluation_leaves_training_state_untouched():
    """Mutation: leave the EMA weights in place, or draw from the global generator."""
    policy, _, evaluator = make()
    with torch.no_grad():
        for parameter in policy.tuning.parameters().values():
            parameter.add_(0.01)
    before = copy.deepcopy({name: p.detach() for name, p in policy.tuning.parameters().items()})
    generator = torch.get_rng_state()
    first = evaluator.evaluate(policy)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(before[name], p) for name, p in policy.tuning.parameters().items())
    assert first.metrics == evaluator.evaluate(policy).metrics


def test_a_later_part_of_a_set_has_the_noise_of_its_rows():
    """So an evaluation that was stopped goes on with the same images. Mutation: number every part's
    rows from 0.
    """
    policy, _, evaluator = make()
    whole, part = evaluator.initial_noise(policy, 6), evaluator.initial_noise(policy, 4, first=2)
    assert torch.equal(whole[2:], part) and not torch.equal(whole[:4], part)


@pytest.mark.parametrize("overrides", [("batch.max_micro_batch=1",), ("batch.max_micro_batch=2",)])
def test_micro_batches_do_not_change_the_result(overrides):
    """Batch times accumulation is one trajectory: the same weights after two iterations, up to
    rounding.

    Mutation: average over micro-batches without dividing by their number, or draw noise per batch.
    """
    one, two = (make(*settings)[:2] for settings in (("batch.max_micro_batch=4",), overrides))
    fit(*one), fit(*two)
    ours, theirs = (policy.tuning.parameters() for policy, _ in (one, two))
    for name, parameter in ours.items():
        difference = (parameter - theirs[name]).abs()
        # Adam turns rounding of a vanishing gradient into a visible step of single weights, never
        # of the mean.
        assert difference.max() < 2e-4 and difference.mean() < 2e-6
    assert one[0].last_metrics["reward/mean"] == pytest.approx(
        two[0].last_metrics["reward/mean"], abs=1e-5
    )
    # Adam would hide another scale.
    norms = [policy.last_metrics["update/grad_norm"] for policy, _ in (one, two)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3) != 0


def test_micro_batches_of_a_group_hold_its_prompt_once():
    """Four samples a prompt in micro-batches of two: one row of tokens for both. Mutation: a row a
    sample.
    """
    policy, data, _ = make("batch.max_micro_batch=2")
    parts = first_batch(policy, data)
    tokens = [part.conditioned.embedded.tensors["tokens"] for part in parts]
    assert [len(rows) for rows in tokens] == [1] * 4 and len(parts) == 4
    assert (
        tokens[0] is tokens[1] and tokens[2] is tokens[3] and not torch.equal(tokens[0], tokens[2])
    )
    for part in parts:
        rows = part.conditioned.conditioning().tensors["tokens"]
        assert torch.equal(rows, policy.embed(part.prompts).tensors["tokens"])


@pytest.mark.parametrize("micro_batch", [2, 4])
def test_equal_rows_are_evaluated_once_with_the_same_result(micro_batch):
    """A group that shares its start gives the same samples and gradient as one evaluation per row.

    Also where a micro-batch holds half a group. Mutation: map rows to the wrong member, or stay
    shared after the first noise.
    """
    policy, data, _ = make(f"batch.max_micro_batch={micro_batch}")
    part = first_batch(policy, data)[-1]
    shared = part.conditioned.field(policy.velocity)
    seen = []

    def counting(x, sigma, conditioning):
        seen.append(len(x))
        return policy.velocity(x, sigma, conditioning)

    x = part.trajectory.x[:, 0]
    assert all(torch.equal(row, x[0]) for row in x)
    assert not torch.equal(part.trajectory.x[0, 1], part.trajectory.x[1, 1])
    once, each = part.conditioned.field(counting)(x, 0.8, True), shared(x, 0.8, False)
    assert seen == [1]
    torch.testing.assert_close(once, each, rtol=1e-4, atol=1e-5)
    weights = torch.randn(once.shape, generator=torch.Generator().manual_seed(0))
    gradients = []
    for velocity in (once, each):
        policy.zero_grad()
        (velocity * weights).sum().backward()
        gradients.append(
            [p.grad.clone() for name, p in policy.tuning.parameters().items() if "lora_B" in name]
        )
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_rows_of_two_prompts_keep_their_own_velocity():
    """Mutation: give all rows that of the first prompt."""
    policy, data, _ = make()
    conditioned = ConditionedRows(
        policy.embed(data.iterations[0].prompts[:2]), torch.tensor([0, 0, 1, 1]), [0, 0, 1, 1]
    )
    x = torch.randn(
        2, *policy.model.latent_shape, generator=torch.Generator().manual_seed(0)
    ).repeat_interleave(2, 0)
    once, each = (
        conditioned.field(policy.velocity)(x, 0.8, is_shared) for is_shared in (True, False)
    )
    torch.testing.assert_close(once, each, rtol=1e-4, atol=1e-5)
    assert (each[0] - each[2]).abs().max() > 0.1


def test_shared_rows_copy_no_others(monkeypatch):
    """Embeddings of long texts are large. Mutation: copy those of all rows for every field."""
    policy, data, _ = make()
    prompts = policy.embed(data.iterations[0].prompts[:2])
    conditioned = ConditionedRows(prompts, torch.tensor([0, 0, 1, 1]), [0, 0, 1, 1])
    copies = []
    whole = conditioned.conditioning
    monkeypatch.setattr(conditioned, "conditioning", lambda: copies.append(1) or whole())
    field = conditioned.field(lambda x, sigma, conditioning: x)
    x = torch.zeros(4, *policy.model.latent_shape)
    field(x, 0.5, True)
    assert not copies
    field(x, 0.5, False)
    field(x, 0.4, False)
    assert len(copies) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver to be found")
def test_no_step_looks_for_a_driver(monkeypatch):
    """Lightning has PyTorch look for its library at every step, for milliseconds where there is
    none. Mutation: leave it at that.
    """
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    policy, _, _ = make()
    optimizer = policy.configure_optimizers()
    for parameter in policy.tuning.parameters().values():
        parameter.grad = torch.ones_like(parameter)
    asked = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: asked.append(1) or 0)
    optimizer.step()
    assert not asked


def test_penalty_adds_its_gradient():
    """The loss is the policy loss plus beta times the distance to the base model.

    Mutation: subtract the penalty, or run the reference with the adapter on (its gradient
    vanishes).
    """
    totals, penalty = [], None
    for beta in (0.0, 2.0):
        policy, data, _ = make("penalty=kl", f"penalty.beta={beta}")
        part = first_batch(awake(policy), data)[0]
        part.advantage = torch.tensor([1.0, -1.0, 0.5, -0.5])
        totals.append(term_loss(policy, part, 1))
        if beta:
            method, index = policy.algorithm, 1
            step = policy.objective.replay(part, index)
            ref = policy.reference.mean(
                part.trajectory, index, part.conditioned, method.intervals, method.sampler
            )
            squared = (step.mean - ref).square().mean((1, 2, 3)) / (2 * step.std**2)
            penalty = squared.mean()
    assert penalty > 1e-4
    torch.testing.assert_close(totals[1] - totals[0], 2 * penalty, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("sampler", ["cps", "flow_sde"])
def test_the_published_penalty_is_that_of_the_sampler(sampler):
    """On CPS steps the KL, on those of an SDE the KL times -dt.

    Mutation: take the whole step's std on every sampler, or -dt.
    """
    distances = {}
    for form in ("kl", "flow_grpo"):
        policy, data, _ = make(f"penalty={form}", f"sampler={sampler}")
        part = first_batch(awake(policy), data)[0]
        distances[form] = policy.objective.term(part, 1, 0).metrics["loss/penalty"].item()
    interval = policy.algorithm.intervals[part.trajectory.steps[1]]
    factor = {"cps": 1.0, "flow_sde": -interval.dt}[sampler]
    assert distances["kl"] > 1e-4 and abs(interval.dt) < 0.5
    assert distances["flow_grpo"] == pytest.approx(factor * distances["kl"], rel=1e-4)


def test_the_published_penalty_needs_what_it_divides_by():
    """Mutation: take any number for a sampler of one's own, which nobody has published."""

    class Plain:
        def __init__(self, sampler):
            self.std, self.gain, self.step = sampler.std, sampler.gain, sampler.step

    policy, _, _ = make("penalty=flow_grpo", "likelihood.form=gaussian")
    own = replace(policy.algorithm, sampler=Plain(policy.algorithm.sampler))
    with pytest.raises(ValueError, match=r"penalty\.form=flow_grpo .*published_std.*Plain"):
        policy.objective.check_method(own)
    policy.objective.check_method(replace(own, penalty=replace(own.penalty, form="kl")))


def test_an_evaluation_with_too_many_missing_rewards_stops():
    """Mutation: report the mean of the few that are left."""

    class Broken:
        def __call__(self, images, prompts):
            raise ConnectionError("no answer")

    policy, _, evaluator = make()
    policy.reward.reward = Broken()
    with pytest.raises(TooManyMissingRewards, match="100%"):
        evaluator.evaluate(policy)


@pytest.mark.parametrize("is_evaluation", [True, False], ids=["evaluation", "training"])
def test_too_many_missing_of_what_is_judged_stop_both(is_evaluation):
    """One image of each call is judged, and that fails. Mutation: count the others as scored, in
    either caller.
    """

    def broken(images, prompts):
        applies = torch.arange(len(prompts)) == 0
        return RewardOutput(torch.zeros(len(prompts)), ~applies, applies=applies[:, None])

    policy, data, evaluator = make("max_missing=0.9", "num_iterations=1")
    policy.reward.reward = broken
    with pytest.raises(TooManyMissingRewards, match="100%"):
        evaluator.evaluate(policy) if is_evaluation else fit(policy, data)


def test_the_guard_gradient_is_that_of_its_centred_ratio():
    """Away from the rollout's weights: d exp(mean(eps d)). Mutation: a bias without gradient."""
    policy, data, _ = make("sampler=flow_sde", "loss=guard", "loss.clip_low=1", "loss.clip_high=1")
    part = first_batch(awake(policy), data)[0]
    part.advantage = torch.tensor([1.0, -2.0, 0.5, 3.0])
    parameters = list(policy.tuning.parameters().values())
    with torch.no_grad():
        for i, parameter in enumerate(parameters):
            parameter.add_(
                0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
            )
    got = torch.autograd.grad(term_loss(policy, part, 0), parameters, allow_unused=True)
    step, old_mean = policy.objective.replay(part, 0), part.trajectory.old_mean[:, 0]
    eps = (part.trajectory.x_next[:, 0] - old_mean) / step.std
    ratio = (eps * (step.mean - old_mean)).mean((1, 2, 3)).exp()
    dt = policy.algorithm.intervals[part.trajectory.steps[0]].dt
    expected = torch.autograd.grad(
        -(part.advantage * ratio).mean() / -dt, parameters, allow_unused=True
    )
    size = max(theirs.abs().max() for theirs in expected if theirs is not None)
    for ours, theirs in zip(got, expected, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * size.item())
