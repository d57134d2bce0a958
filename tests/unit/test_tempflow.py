import math
from dataclasses import replace
from itertools import pairwise
from statistics import fmean

import pytest
from omegaconf import OmegaConf
from runs import CONF

from flowrl.errors import UserError
from flowrl.losses.tempflow import TempFlow
from flowrl.samplers.sde import FlowSDE
from flowrl.schedule import Interval

OPTIONS = {
    "clip_low": 0.1,
    "clip_high": 0.1,
    "advantage_clip": 5.0,
    "std_weight": 2.25,
    "calibrated_for": "gaussian",
}


def test_by_hand(loss_inputs):
    """std 1/2, weight 1.125: log-ratio .05 is within 1.1, .2 beyond; A = -9 is clipped to -5 and
    keeps its ratio.

    Mutation: weigh by another power of std, clip the weighted loss, or leave the weight out.
    """
    inputs = loss_inputs([0.05, 0.2, 0.2], [1, 1, -9])
    assert inputs.std == 0.5
    expected = 1.125 * (-math.exp(0.05) - 1.1 + 5 * math.exp(0.2)) / 3
    output = TempFlow(**OPTIONS)(inputs)
    assert output.loss.item() == pytest.approx(expected, rel=1e-12)
    assert output.metrics["trust/masked_positive"].item() == pytest.approx(1 / 3)
    wider = TempFlow(**OPTIONS)(replace(inputs, std=0.25)).loss
    assert wider.item() == pytest.approx(expected / 2, rel=1e-12)


def test_the_published_weight_has_a_mean_of_1_on_the_published_steps():
    """Flow-SDE at 0.7 on diffusers' grid of ten for SD3.5, whose last step is left out. Mutation:
    another number in its YAML.
    """
    weight = OmegaConf.load(CONF / "loss" / "tempflow.yaml").std_weight
    sigmas = [1, 0.96013, 0.91335, 0.85769, 0.79037, 0.70728, 0.60215, 0.46488, 0.27805, 0.00893]
    sampler = FlowSDE(noise_level=0.7)
    stds = [
        sampler.std(Interval(sigma, sigma_next, sigmas[1]))
        for sigma, sigma_next in pairwise(sigmas)
    ]
    assert weight * fmean(stds) == pytest.approx(1, abs=2e-3)


def test_an_uncalibrated_range_is_refused(loss_inputs):
    """Mutation: clip sums at a range for means."""
    with pytest.raises(UserError, match=r"loss\.calibrated_for=gaussian"):
        TempFlow(**OPTIONS)(replace(loss_inputs([0.0], [1]), reduction="sum"))
