"""The rounding floor of the KL: measured before the first update, warned of, and what a mask makes
of it.
"""

import logging
from dataclasses import replace

import pytest
import torch
from runs import awake, composed, fit, make

from flowrl.launch.build import prepare
from flowrl.losses.dppo import DPPO
from flowrl.training import floor
from flowrl.training.floor import measure_floor

SMALL = ("num_iterations=1", "batch.updates_per_iteration=1", "model.dtype=bfloat16")


def mask(delta=0.1):
    return DPPO(
        delta=delta,
        final_delta=None,
        kl_budget=None,
        divergence="kl",
        calibrated_for="kl",
        advantage_clip=5.0,
    )


def test_a_mask_counts_from_the_floor(loss_inputs):
    """KLs 0.1, 0.29 and 0.31 of likelier samples at a threshold of 0.1: all are dropped without a
    floor, and above one of 0.2 the last alone. A threshold on another divergence has no floor.

    Mutation: ignore the floor, subtract it from the threshold, or add it to any divergence.
    """
    far = loss_inputs([0.1] * 3, [1] * 3, kl=[0.1, 0.29, 0.31], velocity=[0.1, 0.29, 0.31])
    raised = replace(far, kl_floor=0.2)
    share = "trust/masked_fraction"
    assert mask()(far).metrics[share].item() == 1
    assert mask()(raised).metrics[share].item() == pytest.approx(1 / 3)
    other = replace(mask(), divergence="velocity", calibrated_for="velocity")
    assert other(raised).metrics[share].item() == 1


def test_float32_is_fine_and_bfloat16_is_not():
    """Of the embedded model, all steps that may be trained on. In float32 the KL is that of the
    move alone; in bfloat16 each operator rounds another way. Weights come back bitwise, and no
    random state is touched.

    Mutation: measure under equal weights, which gives 0; leave the weights moved; or measure this
    iteration's steps alone.
    """
    largest = {}
    for dtype in ("float32", "bfloat16"):
        policy, data, _ = make(f"model.dtype={dtype}")
        awake(policy)
        before = {
            name: value.detach().clone() for name, value in policy.tuning.parameters().items()
        }
        state = torch.get_rng_state()
        found = measure_floor(policy, data.iterations[0])
        assert found == measure_floor(policy, data.iterations[0])
        assert torch.equal(torch.get_rng_state(), state)
        for name, value in policy.tuning.parameters().items():
            assert torch.equal(value, before[name])
        method = policy.algorithm
        assert tuple(found) == method.steps.candidates(method.num_steps)
        assert all(value > 0 for value in found.values())
        largest[dtype] = max(found.values())
    print(f"floor: {largest}")
    assert largest["float32"] < 1e-8
    assert largest["bfloat16"] > 100 * largest["float32"]


def taken(*overrides, caplog):
    """What a run of one iteration knows of its floor, and what it has warned of."""
    policy, data, _ = make(*SMALL, *overrides)
    with caplog.at_level(logging.WARNING, logger=floor.__name__):
        fit(policy, data)
    texts = [record.getMessage() for record in caplog.records if record.name == floor.__name__]
    caplog.clear()
    return policy, texts


def test_a_run_measures_once_logs_and_warns(caplog):
    """A threshold of 1e-12 is below the floor, one of 1 far above. What was measured is saved, and
    a resumed run neither measures nor warns again.

    Mutation: warn whatever the threshold, measure in every iteration, or lose the floor in a
    checkpoint.
    """
    policy, texts = taken("loss.delta=1e-12", caplog=caplog)
    assert len(texts) == 1
    assert "trust.above_floor=true" in texts[0] and "1e-12" in texts[0]
    logged = {name for name in policy.last_metrics if name.startswith("trust/kl_floor/")}
    assert logged == {f"trust/kl_floor/{number}" for number in policy.floor.values}
    assert not policy.objective.allowed
    resumed, texts = taken("loss.delta=1", caplog=caplog)
    assert texts == []
    resumed.load_state(policy.state())
    assert resumed.floor.values == policy.floor.values
    resumed.load_state({**policy.state(), "kl_floor": None})
    assert resumed.floor.values is None


def test_the_remedy_reaches_the_mask_and_silences_the_warning(caplog):
    """Mutation: measure, and never tell the objective; or diagnose at another threshold than the
    mask's.
    """
    policy, texts = taken("loss.delta=1e-12", "trust.above_floor=true", caplog=caplog)
    assert texts == []
    assert policy.objective.allowed == policy.floor.values
    # One update an iteration: its KL is 0, which is below any threshold above 0.
    assert policy.last_metrics["trust/masked_fraction"] == 0


def test_what_the_objective_allows_reaches_loss_and_diagnostics(loss_inputs):
    """A KL of 0.25 is far at a threshold of 0.1, and not above a floor of 0.2.

    Mutation: leave the floor out of the threshold that diagnostics compare with.
    """
    policy, _, _ = make("loss.delta=0.1")
    near = replace(loss_inputs([1e-6], [1], kl=[0.25]), kl_floor=0.2)
    misses = "trust/clip_misses"
    assert policy.objective.diagnose(near, 0)[misses] == 0
    assert policy.objective.diagnose(replace(near, kl_floor=0.0), 0)[misses] == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("loss=grpo",), "loss=grpo"),
        (("loss.divergence=velocity", "loss.calibrated_for=velocity"), "loss=dppo"),
        (("loss.delta=auto", "loss.kl_budget=1e-6", "batch.updates_per_iteration=4"), "delta=auto"),
        (("loss=nft", "sampler=ode", "rollout.shared_initial_noise=false"), "loss=nft"),
    ],
)
def test_a_remedy_without_a_mask_is_refused(overrides, message):
    """Mutation: take the key in silence where nothing looks at it."""
    with pytest.raises(ValueError, match=rf"trust\.above_floor=true.*{message}"):
        prepare(composed("debug=smoke", "trust.above_floor=true", *overrides))
