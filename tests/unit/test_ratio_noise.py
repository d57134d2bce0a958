"""The ratio's noise: closed form against hand-derived tails, and against draws through training's
own code.
"""

import math

import pytest
import torch
from runs import ROOT

from flowrl.gaussian import GaussianStep, Likelihood
from flowrl.losses.guard import Guard
from flowrl.samplers.cps import CPS
from flowrl.samplers.sde import FlowSDE
from flowrl.schedule import LinearShift, intervals
from flowrl.studies.ratio_noise.decisions import (
    best_clip,
    decide,
    estimators,
    noise,
    population,
    sampled,
    step_kls,
)
from flowrl.studies.ratio_noise.simulation import (
    at_best,
    matching_delta,
    published,
    simulate,
    varied,
)
from flowrl.studies.ratio_noise.tables import measured
from flowrl.studies.record import load
from flowrl.types import LossInputs

STEPS = intervals(LinearShift(shift=3.0), 10)[:-1]
LEVELS = {"flow_sde": 0.7, "cps": 0.8}
ONE = torch.ones(1, 1, dtype=torch.float64)
FEW = {"shift": 3.0, "num_steps": 4, "steps": 3, "spread": 1.0, "quantiles": 40, "growth": 1.0}


def tail(z):
    return math.erfc(z / math.sqrt(2)) / 2


def test_noise_by_hand():
    """KL 2e-4 in 100 dimensions: sqrt(4e-6). Mutation: forget D, or a factor 2."""
    assert float(noise(torch.tensor(2e-4, dtype=torch.float64), 100)) == pytest.approx(2e-3)


@pytest.mark.parametrize("sampler", [FlowSDE(noise_level=0.7), CPS(noise_level=0.8)])
def test_a_steps_kl_is_that_of_its_gaussian(sampler):
    """Mutation: leave the gain out, or take a diffusion coefficient for std."""
    x, moved = torch.randn(1, 4, 2, 2, dtype=torch.float64), 0.125
    for interval in STEPS:
        old = sampler.step(x, torch.zeros_like(x), interval)
        new = sampler.step(x, torch.full_like(x, moved), interval)
        expected = float((new.mean - old.mean).square().mean() / (2 * old.std**2))
        found = step_kls(sampler, [interval], torch.tensor([moved], dtype=torch.float64))
        assert float(found) == pytest.approx(expected, rel=1e-9)


def test_the_population_sits_at_the_threshold():
    """Mutation: calibrate the velocity instead of its square."""
    kls = step_kls(
        CPS(noise_level=0.8), STEPS, population(CPS(noise_level=0.8), STEPS, 1e-6, 1.0, 400)
    )
    assert float(kls.log().mean()) == pytest.approx(math.log(1e-6))
    assert float(kls[0].log().std()) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(("kl", "delta"), [(2e-6, 1e-6), (5e-7, 1e-6)])
def test_decisions_by_hand(kl, delta):
    """One KL, D = 10,000: each side's tail of the clip against that of the mask, or against nothing
    below delta.

    Mutation: swap the signs, drop the shift of the signal, or ask for KL > delta on the wrong side.
    """
    dimensions, clip = 10_000, 2e-5
    std = math.sqrt(2 * kl / dimensions)
    up, down = tail((math.log1p(clip) + kl) / std), tail(-(math.log1p(-clip) + kl) / std)
    found = decide(
        torch.tensor([[kl]]).double(),
        ONE,
        dimensions=dimensions,
        clip=clip,
        delta=delta,
        is_centred=False,
    )
    if kl < delta:
        assert found.false_alarms == pytest.approx(up + down) and found.misses == 0
    else:
        masked = tail(kl / std) + tail(-kl / std)
        assert found.false_alarms == 0 and found.misses == pytest.approx(masked - up - down)
    assert found.gross == 0  # within a factor of four of delta


def test_with_many_dimensions_a_clip_sees_the_divergence():
    """The noise is gone, the log-ratio is minus the KL: with A < 0 a tuned clip errs nowhere. With
    few it always does.

    Mutation: let the noise not shrink with D.
    """
    sampler = CPS(noise_level=0.8)
    kl = step_kls(sampler, STEPS, population(sampler, STEPS, 1e-6, 1.0, 200))
    scales = torch.ones(len(STEPS), 1, dtype=torch.float64)
    shares = []
    for dimensions in (256, 10**11):
        clip = best_clip(kl, scales, dimensions=dimensions, delta=1e-6, is_centred=False)
        shares.append(
            decide(
                kl, scales, dimensions=dimensions, clip=clip, delta=1e-6, is_centred=False
            ).contradicted
        )
    assert shares[0] > 0.15 and shares[1] < 0.02


@pytest.mark.parametrize("number", [0, 2, 3])
def test_the_closed_form_agrees_with_draws(number):
    """20,000 terms through GaussianStep, Likelihood and Diagnostics: within four standard errors.

    Mutation: lose the scale of the unnormalised form, or count shares of all terms in one of the
    two.
    """
    estimator, few = estimators(LEVELS)[number], STEPS[2:6]
    velocity = population(estimator.sampler, few, 1e-4, 1.0, 200)
    kl = step_kls(estimator.sampler, few, velocity)
    scales = torch.tensor([estimator.scale(own) for own in few], dtype=torch.float64)[:, None]
    clip = best_clip(kl, scales, dimensions=64, delta=1e-4, is_centred=False)
    expected = decide(
        kl, scales, dimensions=64, clip=clip, delta=1e-4, is_centred=False
    ).contradicted
    options = {"dimensions": 64, "clip": clip, "delta": 1e-4, "samples": 5000, "seed": 0}
    error = 2 * math.sqrt(expected / 2 / 20_000)
    assert sampled(estimator, few, velocity, **options) == pytest.approx(expected, abs=4 * error)


def test_the_centred_clip_is_that_of_training():
    """GRPO-Guard's loss drops so many drawn terms as the closed form says, where no divergence
    masks any.

    Mutation: keep the signal, or scale by std^2.
    """
    estimator, interval, dimensions, clip, count = estimators(LEVELS)[1], STEPS[3], 64, 5e-4, 20_000
    moved = torch.tensor([0.05], dtype=torch.float64)
    kl = step_kls(estimator.sampler, [interval], moved)
    scales = torch.full((1, 1), estimator.scale(interval), dtype=torch.float64)
    options = {"dimensions": dimensions, "clip": clip, "delta": math.inf, "is_centred": True}
    expected = decide(kl, scales, **options).false_alarms / 2
    generator = torch.Generator().manual_seed(0)
    old = GaussianStep(
        torch.zeros(count, dimensions, 1, 1, dtype=torch.float64), estimator.sampler.std(interval)
    )
    x_next = old.sample(torch.randn(old.mean.shape, generator=generator, dtype=torch.float64))
    new = GaussianStep(old.mean + moved * estimator.sampler.gain(interval), old.std)
    likelihood, none = (
        Likelihood(reduction="mean", form="gaussian"),
        torch.zeros(count, dtype=torch.float64),
    )
    inputs = LossInputs(
        likelihood.log_ratio(new, old.mean, x_next),
        torch.randint(2, (count,), generator=generator).double() * 2 - 1,
        likelihood.kl(new, old.mean),
        none,
        none,
        std=old.std,
        dt=interval.dt,
        form="gaussian",
        reduction="mean",
        dimensions=dimensions,
    )
    dropped = float(
        Guard(clip_low=clip, clip_high=clip, advantage_clip=5.0)(inputs).metrics[
            "trust/masked_fraction"
        ]
    )
    assert 0.05 < expected < 0.45
    assert dropped == pytest.approx(expected, abs=4 * math.sqrt(expected / count))


def test_the_best_range_is_no_worse_than_its_neighbours():
    """Mutation: minimise false alarms alone."""
    estimator = estimators(LEVELS)[1]
    kl = step_kls(estimator.sampler, STEPS, population(estimator.sampler, STEPS, 1e-6, 1.0, 100))
    scales = torch.tensor([estimator.scale(own) for own in STEPS], dtype=torch.float64)[:, None]
    best = best_clip(kl, scales, dimensions=4096, delta=1e-6, is_centred=True)
    shares = [
        decide(
            kl, scales, dimensions=4096, clip=best * factor, delta=1e-6, is_centred=True
        ).contradicted
        for factor in (0.5, 1.0, 2.0)
    ]
    assert min(shares) == shares[1]


@pytest.mark.parametrize("number", range(4))
def test_the_threshold_of_a_range_is_the_one_it_is_best_for(number):
    """There and back, within a step of either grid. Mutation: search downwards, or in the wrong
    dimensions.
    """
    estimator = estimators(LEVELS)[number]
    given = FEW | {"dimensions": 4096}
    clip, _ = at_best(estimator, given | {"delta": 3e-6})
    assert matching_delta(estimator, given, clip) == pytest.approx(3e-6, rel=0.06)


def test_where_noise_rules_a_ranges_threshold_is_its_square():
    """noise = sqrt(2 delta / D) over a signal of a hundredth of it. Mutation: a threshold that
    grows with the range.
    """
    one, ten = (
        matching_delta(estimators(LEVELS)[0], FEW | {"dimensions": 16}, clip)
        for clip in (3e-4, 3e-3)
    )
    assert ten / one == pytest.approx(100, rel=0.15)


@pytest.mark.slow
def test_the_record_is_what_the_formulas_give():
    """Mutation: change a formula and keep what was computed with the old one."""
    found = load(ROOT / "experiments" / "ratio_noise" / "results.json")["simulation"]
    for kept, own in ((found["published"], published), (found["varied"], varied)):
        for row, fresh in zip(kept, own(found["setting"]), strict=True):
            assert row == pytest.approx(fresh)


def test_the_noise_that_a_run_should_have():
    """KL 4e-4 and 1e-4 in 100 dimensions, halved by the first update: (2e-3 + 1e-3) / 2.

    Mutation: average the KLs first.
    """
    logged = {
        "trust/kl_old/0": [4e-4],
        "trust/kl_old/3": [1e-4],
        "trust/log_ratio_noise": [2e-3, 1e-3],
    }
    run = {"training": logged | {"trust/clip_false_alarms": [0.25], "trust/clip_misses": [0.5]}}
    assert measured(run, 100) == pytest.approx((4e-4, 1e-4, 1.5e-3, 1.5e-3, 0.25, 0.5))


def test_simulation_fills_its_tables():
    """Mutation: draw the centred ratio, which training's diagnostics do not know."""
    spec = {
        "shift": 3.0,
        "num_steps": 4,
        "noise_levels": LEVELS,
        "delta": 1e-6,
        "spread": 1.0,
        "quantiles": 20,
    }
    spec |= {
        "dimensions": [16, 64],
        "sampled_dimensions": [64],
        "samples": 20,
        "seed": 0,
        "run_dimensions": 256,
    }
    spec |= {
        "run_delta": 2e-5,
        "varied_dimensions": 64,
        "growth": 1.0,
        "published": {"CPS, ratio": 1e-3},
    }
    spec |= {
        "published_on": {"steps": 3, "dimensions": 64},
        "carried_to": {"steps": 3, "dimensions": 16},
    }
    spec["variations"] = [
        {"name": "same", "steps": 3, "growth": 1.0},
        {"name": "other", "steps": 2, "growth": 4.0},
    ]
    found = simulate(spec)
    assert [len(rows) for rows in found["estimators"].values()] == [2] * 4
    assert sum("sampled" in row for rows in found["estimators"].values() for row in rows) == 3
    assert found["at_threshold"][1]["noise"] == pytest.approx(math.sqrt(2e-6 / 64))
    assert found["at_threshold"][-1]["noise"] == pytest.approx(math.sqrt(4e-5 / 256))
    assert len(found["varied"]) == 8
    assert [row["label"] for row in found["published"]] == ["CPS, ratio"]
    # Noise rules, so the range grows with the root of the dimensions' ratio.
    assert found["published"][0]["carried"] == pytest.approx(2e-3, rel=0.06)
    with pytest.raises(ValueError, match=r"clip=0\.5 of CPS, ratio is best for no delta"):
        simulate(spec | {"published": {"CPS, ratio": 0.5}})
    for label, rows in found["estimators"].items():
        same, other = (row for row in found["varied"] if row["label"] == label)
        assert same["contradicted"] == rows[1]["contradicted"] != other["contradicted"]
    assert all(
        row["carried"] >= row["contradicted"] - 1e-12
        for rows in found["estimators"].values()
        for row in rows
    )
