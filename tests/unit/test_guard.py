import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from flowrl.gaussian import GaussianStep, Likelihood
from flowrl.losses.guard import Guard
from flowrl.types import LossInputs


def guard(inputs, **options):
    return Guard(**options)(inputs)


wide = partial(guard, clip_low=1.0, clip_high=9.0, advantage_clip=5.0)


def test_by_hand(loss_inputs):
    """std 1/2, dt -1/10: r = exp((log-ratio + KL) / 2), the loss ten times -A r.

    Mutation: leave the bias or std out, multiply by -dt, or divide by dt with its sign.
    """
    inputs = loss_inputs([0.2, -0.4], [1, -2], kl=[0.1, 0.2])
    expected = 10 * (-math.exp(0.15) + 2 * math.exp(-0.1)) / 2
    assert wide(inputs).loss.item() == pytest.approx(expected, rel=1e-12)


def test_ratio_is_the_exponential_of_the_noise_part(normal):
    """(log-ratio + KL) std = mean(eps d) whatever the size of d. Mutation: average the bias over
    the batch.
    """
    old, eps, std = normal(3, 2, 4, 4), normal(3, 2, 4, 4), 0.3
    d = normal(3, 2, 4, 4) * torch.tensor([0.01, 0.1, 0.5]).view(3, 1, 1, 1)
    likelihood = Likelihood(reduction="mean", form="gaussian")
    step, old_step = GaussianStep(old + d, std), GaussianStep(old, std)
    x_next = old_step.sample(eps)
    none = torch.zeros(3, dtype=torch.float64)
    kl, log_ratio = likelihood.kl(step, old), likelihood.log_ratio(step, old, x_next)
    how = {"form": "gaussian", "reduction": "mean", "dimensions": 32}
    inputs = LossInputs(log_ratio, none, kl, none, none, std, -0.1, **how)
    for i, noise in enumerate((eps * d).mean((1, 2, 3)).tolist()):
        advantage = torch.zeros(3, dtype=torch.float64)
        advantage[i] = 1.0
        assert wide(replace(inputs, advantage=advantage)).loss.item() == pytest.approx(
            -10 * math.exp(noise) / 3
        )


def test_it_clips_the_centred_ratio(loss_inputs):
    """Log-ratio 0.4, bias 0: r = e^0.2 is beyond 1.1. Mutation: clip before std is multiplied
    in.
    """
    output = guard(loss_inputs([0.4, 0.1], [1, 1]), clip_low=0.1, clip_high=0.1, advantage_clip=5.0)
    assert output.loss.item() == pytest.approx(-10 * (1.1 + math.exp(0.05)) / 2, rel=1e-12)
    assert output.metrics["trust/masked_positive"].item() == 0.5


@pytest.mark.parametrize(
    ("key", "value"), [("form", "unnormalised"), ("reduction", "sum"), ("sampler", "cps")]
)
def test_it_needs_mean_gaussian_log_probabilities_of_flow_sde(key, value):
    """Mutation: drop a check."""
    loss = Guard(clip_low=1.0, clip_high=9.0, advantage_clip=5.0)
    suited = {"form": "gaussian", "reduction": "mean", "sampler": "flow_sde"}
    loss.check(**suited)
    with pytest.raises(ValueError, match=value):
        loss.check(**suited | {key: value})
