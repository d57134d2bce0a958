"""How conditions compare, on records written by hand: at equal budget and at equal reward."""

import math

import numpy as np
import pytest

from flowrl.studies.analysis import (
    by_seed,
    compare,
    conditions,
    difference_at_equal,
    gains,
    interaction,
    kl_ratio_at_equal,
    value_at,
)
from flowrl.studies.record import mean_of
from flowrl.studies.tables import course_table, interaction_table, main_table, quarters

REWARD, KL = "eval/held_in/part/soft", "eval/held_in/kl_ref"


def test_value_at_a_reward_by_hand():
    """Halfway between 0.5 and 0.75 the value is halfway from 1 to 4, its root halfway from 1 to 2;
    a dip after the first crossing changes nothing.

    Mutation: take the last crossing, or the evaluation after it; join the KL itself by a line.
    """
    points = [(0.0, 0.25), (1.0, 0.5), (4.0, 0.75), (5.0, 0.5), (9.0, 0.75)]
    assert value_at(points, 0.625) == 2.5 and value_at(points, 0.625, power=0.5) == 2.25
    assert value_at(points, 0.75) == 4.0 == value_at(points, 0.75, power=0.5)
    assert math.isnan(value_at(points, 0.8)) and math.isnan(value_at(points, 0.25))
    assert (
        value_at([(-1e-9, 0.0), (1.0, 1.0)], 0.5, power=0.5) == 0.25
    )  # the base model's KL is 0 up to rounding


def run(seed, *points, method="x"):
    rows = [{"iteration": i, REWARD: soft, KL: kl} for i, (kl, soft) in enumerate(points)]
    own = {
        "stage": "test",
        "method": method,
        "variant": "",
        "seed": seed,
        "status": "finished",
        "evaluations": rows,
    }
    return own | {"images": 288, "iterations": 1, "seconds": 1.0}


def test_kl_at_equal_reward_by_hand():
    """Seed 0: theirs ends at 0.75, ours was there at KL 1 against 4: a quarter. Seed 1: theirs ends
    at 0.625, where our root of KL is half of 4's: 1 against 1. Their geometric mean is 1/2. Seed 2
    never rose, so it is out.

    Mutation: compare at the ends, or average the ratios.
    """
    ours = [
        run(0, (0, 0.5), (1, 0.75), (2, 1.0)),
        run(1, (0, 0.5), (4, 0.75)),
        run(2, (0, 0.5), (1, 0.75)),
    ]
    theirs = [
        run(0, (0, 0.5), (4, 0.75)),
        run(1, (0, 0.5), (1, 0.625)),
        run(2, (0, 0.5), (1, 0.25)),
    ]
    found = kl_ratio_at_equal(ours, theirs, REWARD, KL)
    assert found.mean == pytest.approx(0.5) and found.count == 2
    nothing = kl_ratio_at_equal(ours[2:], theirs[2:], REWARD, KL)
    assert nothing.count == 0 and math.isnan(nothing.mean)
    assert difference_at_equal(ours, theirs, REWARD, KL).mean == (-3 + 1) / 2


def test_methods_on_one_curve_cost_the_same():
    """Reward is the root of KL for both; who went further is not charged for it. Mutation: lines
    between KLs.
    """
    ways = (0, 0.03, 0.07, 0.1), (0, 0.002, 0.01)
    ours, theirs = ([run(0, *((kl, 0.5 + kl**0.5) for kl in way))] for way in ways)
    assert kl_ratio_at_equal(ours, theirs, REWARD, KL).mean == pytest.approx(1)


def test_noise_leans_equal_reward_to_the_run_that_drifted_less():
    """Two runs on one curve, KL 0.03 and 0.047 at the end: as the studies' page says, a tenth less,
    not none.

    Mutation: compare each at its own last evaluation, which would say 0.64.
    """
    rng = np.random.default_rng(0)

    def noisy(final):
        kls = final * np.arange(5) / 4
        scores = 0.71 + 0.12 * np.sqrt(kls / 0.047) + rng.normal(0, 0.02, 5) * (kls > 0)
        return [run(0, *zip(kls, scores, strict=True))]

    logs = [
        np.log(kl_ratio_at_equal(noisy(0.03), noisy(0.047), REWARD, KL).mean) for _ in range(2000)
    ]
    assert 0.85 < np.exp(np.nanmean(logs)) < 0.94


def test_a_failed_run_keeps_its_last_score():
    """In the reward as in the KL; a seed is not dropped because it went wrong. Mutation: leave it
    out.
    """
    failed = run(1, (0, 0.5), (1, 0.375)) | {"status": "failed"}
    assert by_seed([run(0, (0, 0.5), (1, 0.75)), failed], REWARD) == {"0": 0.75, "1": 0.375}


def test_an_interaction_by_hand():
    """The change gives us 0.25 and 0.5, them 0.125 each. Mutation: compare the changed runs
    alone.
    """

    def runs(*ends):
        return [run(seed, (0, 0), (1, end)) for seed, end in enumerate(ends)]

    assert (
        interaction(
            (runs(0.75, 1.0), runs(0.5, 0.5)), (runs(0.375, 0.375), runs(0.25, 0.25)), REWARD
        ).mean
        == 0.25
    )


def test_an_interaction_of_two_changes():
    """With the mask the change gives 0.25, without it 0.125. Mutation: take the same change on both
    sides.
    """
    ends = {"dppo two": 0.75, "dppo one": 0.5, "dppo two, none": 0.375, "dppo one, none": 0.25}
    groups = {name: [run(seed, (0, 0), (1, end)) for seed in (0, 1)] for name, end in ends.items()}
    other = {"of": "dppo", "change": ["two, none", "one, none"]}
    report = {"rewards": ["soft"], "metrics": {"soft": REWARD}}
    report["interactions"] = [{"of": "dppo", "change": ["two", "one"], "against": [other]}]
    assert interaction_table(groups, report).rows == [
        ["dppo two for dppo one against dppo two, none for dppo one, none", "+0.125"]
    ]


def test_the_course_of_training_by_hand():
    """Eight values: two, four, two. Mutation: halves, thirds, or the last quarter from the
    middle.
    """
    assert quarters([1, 3, 4, 4, 6, 6, 7, 9]) == (2.0, 5.0, 8.0)
    assert all(map(math.isnan, quarters([1, 2, 3])))
    runs = [
        run(seed, (0, 0.5), (1, 0.75)) | {"training": {"trust/kl_old": [1.0, 2.0, 4.0, 3.0 + seed]}}
        for seed in (0, 1)
    ]
    table = course_table({"a": runs}, {"KL": "trust/kl_old", "masked": "trust/masked_fraction"})
    assert table.columns == (
        "condition",
        "KL, first quarter",
        "KL, middle",
        "KL, last quarter",
        "masked, first quarter",
        "masked, middle",
        "masked, last quarter",
    )
    assert [own.mean for own in table.rows[0][1:4]] == [1.0, 3.0, 3.5]
    assert math.isnan(table.rows[0][4].mean)


def test_comparisons_by_hand():
    """Ours ends at 0.75 and 1.0, theirs at 0.625 and 0.75; seed 7 is not shared.

    Mutation: divide means over unshared seeds, lose the base, or call a loss so many times a gain.
    """
    ours = [run(0, (0, 0.5), (1, 0.75)), run(1, (0, 0.5), (1, 1.0)), run(7, (0, 0.5), (1, 9.0))]
    theirs = [run(0, (0, 0.5), (1, 0.625)), run(1, (0, 0.5), (1, 0.75))]
    found = compare(ours, theirs, REWARD)
    assert found["difference"].mean == 0.1875 and found["difference"].count == 2
    assert found["ratio"].mean == pytest.approx(0.875 / 0.6875)
    assert found["ratio of gains"].mean == pytest.approx(2.0) and found["ratio of gains"].count == 2
    lost = [run(0, (0, 0.5), (1, 0.25)), run(1, (0, 0.5), (1, 0.375))]
    assert math.isnan(compare(lost, theirs, REWARD)["ratio of gains"].mean)


def test_conditions_keep_the_order_of_the_plan():
    """Mutation: sort them by name, or take every stage."""
    runs = [run(0, method="b"), run(0, method="a"), run(1, method="b") | {"stage": "tune"}]
    assert {label: len(own) for label, own in conditions(runs, ["test"]).items()} == {
        "b": 1,
        "a": 1,
    }
    assert list(conditions(runs, ["test"])) == ["b", "a"]


def test_a_base_model_stands_above_what_began_from_it():
    """Where another reward is what is measured, the same model begins from another score.

    Mutation: show the first condition's for all of them, or one for each condition.
    """
    groups = {
        "a": [run(0, (0, 0.5), (1, 0.75))],
        "b": [run(0, (0, 0.5001), (1, 0.625))],
        "c weak": [run(0, (0, 0.25), (1, 0.375)) | {"variant": "weak"}],
    }
    rows = main_table(groups, {"reward": REWARD}).rows
    assert [row[0] for row in rows] == ["base model", "a", "b", "base model, weak", "c weak"]
    assert [row[2] for row in rows if not row[1]] == [0.5, 0.25]


def test_the_highest_score_of_a_course():
    """Wherever it was, but before training. Mutation: take the last one, or the base model's."""
    highest = f"highest of {REWARD}"
    runs = [run(0, (0, 0.9), (1, 0.75), (2, 0.5)), run(1, (0, 0.1), (1, 0.25))]
    assert by_seed(runs, highest) == {"0": 0.75, "1": 0.25}
    assert gains(runs, highest) == pytest.approx({"0": -0.15, "1": 0.15})


def test_a_metric_may_have_another_name():
    """The first that a row has; of several metrics the mean, NaN where one is missing.

    Mutation: take the first name alone.
    """
    row = {"b": 0.25, "c": 0.75}
    assert mean_of(row, "a | b") == 0.25 and mean_of(row, "b | c") == 0.25
    assert mean_of(row, ["a | c", "b"]) == 0.5
    assert math.isnan(mean_of(row, "a | d")) and math.isnan(mean_of(row, ["a", "b"]))
