"""A base model whose latents have other axes than channels, height and width trains like others."""

from functools import cache

import pytest
import torch
from runs import fit, make

from flowrl.models.sd3 import SD3

SMALL = ("num_iterations=2", "batch.max_micro_batch=2", "ema.every=1")
METHODS = [
    ("cps", "dppo"),
    pytest.param("flow_sde", "grpo", marks=pytest.mark.slow),
    ("ode", "nft"),
    pytest.param("ode", "awm", marks=pytest.mark.slow),
]


class Reshaped(SD3):
    """The embedded model, whose latents the rest of FlowRL sees under other axes."""

    axes: tuple[int, ...]

    def __init__(self, **options):
        super().__init__(**options)
        self.plain = self.latent_shape
        self.latent_shape = self.axes

    def velocity(self, x, sigma, conditioning, guidance_scale):
        plain = x.reshape(-1, *self.plain)
        return super().velocity(plain, sigma, conditioning, guidance_scale).reshape(x.shape)

    def decode(self, x0):
        return super().decode(x0.reshape(-1, *self.plain))


class Flat(Reshaped):
    """Latents [B, N, C], as packed tokens are."""

    axes = (32, 8)


class Frames(Reshaped):
    """Latents [B, F, C, h, w], as a video's are."""

    axes = (2, 2, 8, 8)


@cache
def trained(sampler, loss, *model):
    """A policy after two iterations, its weights, and the numbers of its evaluation."""
    penalty = ("penalty=velocity", "penalty.beta=1e-2")
    policy, data, evaluator = make(f"sampler={sampler}", f"loss={loss}", *SMALL, *penalty, *model)
    fit(policy, data)
    weights = {name: value.detach() for name, value in policy.tuning.parameters().items()}
    return policy, weights, evaluator.evaluate(policy).metrics


@pytest.mark.parametrize("kind", [pytest.param("Flat", marks=pytest.mark.slow), "Frames"])
@pytest.mark.parametrize(("sampler", "loss"), METHODS)
def test_two_iterations_are_the_same_whatever_the_axes(sampler, loss, kind):
    """Rollout, gate, replay, penalty, losses, optimizer, average and evaluation: every metric and
    weight, bitwise. Mutation: any reduction or broadcast over three axes.
    """
    plain, weights, numbers = trained(sampler, loss)
    shaped, others, found = trained(sampler, loss, f"model._target_={__name__}.{kind}")
    assert shaped.model.latent_shape == globals()[kind].axes != plain.model.latent_shape
    ours, theirs = (
        {name: value for name, value in policy.last_metrics.items() if name[:5] != "perf/"}
        for policy in (shaped, plain)
    )
    assert "loss/policy" in ours and ours == pytest.approx(theirs, rel=0, abs=0, nan_ok=True)
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    for name, average in plain.ema.weights.items():
        assert torch.equal(average, shaped.ema.weights[name])
    assert any(name.endswith("/kl_ref") for name in numbers)
    assert found == pytest.approx(numbers, rel=0, abs=0, nan_ok=True)
