"""What the loop promises on the embedded model: ratio 1, gradients to LoRA only, a reference that is the base."""

import copy

import pytest
import torch
from runs import fit, make

from flowrl.models import lora


def first_batch(policy, data):
    return [policy.sample(data.iterations[0], rows) for update in policy.plan.updates(0) for rows in update]


@pytest.mark.parametrize("micro_batch", [1, 4])
@pytest.mark.parametrize("sampler", ["cps", "flow_sde", "dance_sde"])
def test_replay_of_a_fresh_rollout_is_bitwise(sampler, micro_batch):
    """Ratio 1 and divergence 0 before the first update, with gradients on, for LoRA weights away from zero.

    Mutation: replay at sigma_next, or with the next stochastic step's state.
    """
    policy, data, _ = make(f"sampler={sampler}", f"batch.max_micro_batch={micro_batch}")
    with torch.no_grad():
        for i, parameter in enumerate(lora.parameters(policy.transformer).values()):
            parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(i))
    for part in first_batch(policy, data):
        for index in range(len(part.trajectory.steps)):
            step = policy.replay(part, index)
            log_prob = policy.algorithm.likelihood.log_prob(step, part.trajectory.x_next[:, index])
            assert step.mean.requires_grad
            assert torch.equal(log_prob, part.trajectory.old_log_prob[:, index])
            assert torch.equal(step.mean, part.trajectory.old_mean[:, index])


def test_gate_stops_a_run_whose_replay_drifts():
    """Mutation: compare the drift with `<` the wrong way round, or never call the gate."""
    policy, data, _ = make()
    part = first_batch(policy, data)[0]
    policy.check_gate(part)
    assert policy.has_passed_gate
    part.trajectory.old_log_prob.add_(1e-5)
    with pytest.raises(RuntimeError, match="gate_tolerance"):
        policy.check_gate(part)


@pytest.mark.parametrize("loss", ["grpo", "dppo"])
def test_base_is_untouched_and_gradients_reach_lora_only(loss):
    """Mutation: leave the base's requires_grad on, or hand all parameters to the optimizer."""
    policy, data, _ = make(f"loss={loss}", "num_iterations=1")
    own = lora.parameters(policy.transformer)
    before = {name: p.detach().clone() for name, p in policy.transformer.named_parameters()}
    assert {name for name, p in policy.transformer.named_parameters() if p.requires_grad} == own.keys()
    assert all(p.dtype == torch.float32 for p in own.values())
    fit(policy, data)
    after = dict(policy.transformer.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before if name not in own)
    assert all(not torch.equal(before[name], after[name]) for name in own)
    assert set(dict(policy.named_parameters())) == {f"transformer.{name}" for name in after}


def test_reference_is_the_base_model():
    """Mutation: run the reference with the adapter on."""
    policy, data, _ = make()
    part = first_batch(policy, data)[0]
    x = part.trajectory.x0
    conditioning = part.group.conditioning
    base = policy.velocity(x, 0.5, conditioning).detach()
    with torch.no_grad():
        for parameter in lora.parameters(policy.transformer).values():
            parameter.add_(0.1)
    assert not torch.allclose(policy.velocity(x, 0.5, conditioning), base, atol=1e-3)
    assert torch.equal(policy.reference.velocity(x, 0.5, conditioning), base)
    assert not torch.allclose(policy.velocity(x, 0.5, conditioning), base, atol=1e-3)


def test_guidance_combines_both_predictions():
    """v = v_negative + g (v_positive - v_negative); at g = 1 the unguided pass. Mutation: swap the chunks."""
    policy, _, evaluator = make("model.has_guidance=true")
    conditioning = policy.embed(evaluator.prompts[:3])
    x = torch.randn(3, 8, 8, 8, generator=torch.Generator().manual_seed(0))
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
        for parameter in lora.parameters(policy.transformer).values():
            parameter.add_(0.01)
    before = copy.deepcopy({name: p.detach() for name, p in lora.parameters(policy.transformer).items()})
    generator = torch.get_rng_state()
    first = evaluator.evaluate(policy)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(before[name], p) for name, p in lora.parameters(policy.transformer).items())
    assert first.metrics == evaluator.evaluate(policy).metrics


@pytest.mark.parametrize("overrides", [("batch.max_micro_batch=1",), ("batch.max_micro_batch=2",)])
def test_micro_batches_do_not_change_the_result(overrides):
    """Batch times accumulation is one trajectory: the same weights after two iterations, up to rounding.

    Mutation: average over micro-batches without dividing by their number, or draw noise per batch.
    """
    one, two = (make(*settings)[:2] for settings in (("batch.max_micro_batch=4",), overrides))
    fit(*one), fit(*two)
    ours, theirs = (lora.parameters(policy.transformer) for policy, _ in (one, two))
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-3, atol=2e-5)
    assert one[0].last_metrics["reward/mean"] == pytest.approx(two[0].last_metrics["reward/mean"], abs=1e-5)
