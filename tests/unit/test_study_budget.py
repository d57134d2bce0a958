"""Runs at equal images and equal seconds, and what a score costs, on records written by hand."""

import math

import pytest

from flowrl.studies.budget import (
    at_budget,
    cost_ratio,
    costs_of,
    groups_at,
    paced,
    seconds_of_an_image,
)
from flowrl.studies.budget_tables import cost_ratio_table, scores_table
from flowrl.studies.plan import Study
from flowrl.studies.tables import tables

STRICT = "eval/held_in/part/strict"
REPORT = {
    "stages": ["test"],
    "metrics": {"strict": STRICT},
    "rewards": ["strict"],
    "kl": "strict",
    "equal": [],
    "budgets": {"images": 400, "seconds": 20},
    "scores": {"strict": [0.6, 0.9]},
    "compare": [["x", "y"]],
    "cost_ratios": [["x", "y"]],
}


def run(seed, *scores, method="x", speed=10.0, status="finished", every=10):
    """A run of 20 images an iteration whose evaluations are `every` iterations apart."""
    rows = [{"iteration": every * i, STRICT: score} for i, score in enumerate(scores)]
    iterations = every * (len(scores) - 1)
    return {
        "stage": "test",
        "method": method,
        "variant": "",
        "seed": seed,
        "status": status,
        "evaluations": rows,
        "iterations": iterations,
        "images": 20 * iterations,
        "seconds": 999.0,
        "images_per_second": speed,
    }


def test_a_run_cut_at_a_budget_of_images_by_hand():
    """300 images are 15 iterations, halfway between 0.4 and 0.8; 200 are an evaluation itself, and
    600 more than the run drew.

    Mutation: take the evaluation before or after, keep those behind, or count iterations.
    """
    (cut,) = at_budget([run(0, 0.2, 0.4, 0.8)], "images", 300)
    assert [row[STRICT] for row in cut["evaluations"]] == [0.2, 0.4, pytest.approx(0.6)]
    assert cut["images"] == 300 and cut["seconds"] == 30
    (exact,) = at_budget([run(0, 0.2, 0.4, 0.8)], "images", 200)
    assert [row[STRICT] for row in exact["evaluations"]] == [0.2, 0.4]
    assert at_budget([run(0, 0.2, 0.4, 0.8)], "images", 600) == []


def test_seconds_are_of_the_median_run():
    """Speeds 5, 10 and 40: an image takes 0.1 s in all three, so 30 s are 300 images.

    Mutation: each run's own speed, their mean, or the wall time of the run.
    """
    runs = [
        run(0, 0.2, 0.4, 0.8, speed=5.0),
        run(1, 0.2, 0.4, 0.8),
        run(2, 0.2, 0.4, 0.8, speed=40),
    ]
    assert seconds_of_an_image(runs) == 0.1
    for cut in at_budget(runs, "seconds", 30):
        assert cut["evaluations"][-1][STRICT] == pytest.approx(0.6)
        assert cut["images"] == pytest.approx(300) and cut["seconds"] == pytest.approx(30)
    assert math.isnan(seconds_of_an_image([run(0, 0.2, speed=None)]))


def test_a_stage_of_its_own_tells_the_speed():
    """y was timed at 40 images a second, x at none. Mutation: the speed of the run itself, or that
    of another method.
    """
    runs = [run(0, 0.2, 0.4, method="x"), run(0, 0.2, 0.4, method="y", speed=7.0)]
    timed = run(100, 0.2, 0.3, method="y", speed=40.0) | {"stage": "pace"}
    found = paced([*runs, timed], ["pace"])
    assert [own["images_per_second"] for own in found] == [10.0, 40.0, 40.0]
    assert paced(runs, []) == runs


def test_a_failed_run_stays_and_a_short_one_leaves():
    """Mutation: leave failed runs out, or keep finished ones that never came so far."""
    failed = run(0, 0.2, 0.1, status="failed")
    short = run(1, 0.2, 0.4)
    assert at_budget([failed, short], "images", 400) == [failed]
    assert groups_at({"x": [failed], "y": [short]}, "images", 400) == {"x": [failed]}


def test_what_a_score_costs_by_hand():
    """0.6 lies halfway between the evaluations at 200 and 400 images, which take 20 and 40 s.

    Mutation: the evaluation after it; seconds where images are asked for.
    """
    runs = [run(0, 0.2, 0.4, 0.8, 0.5), run(1, 0.2, 0.4, 0.5)]
    assert costs_of(runs, "images", STRICT, 0.6) == {"0": pytest.approx(300), "1": math.inf}
    assert costs_of(runs, "seconds", STRICT, 0.6)["0"] == pytest.approx(30)


def test_a_ratio_of_costs_is_of_the_pairs_that_both_reached():
    """1/2 and 1/8: their geometric mean is 1/4; a seed that one side never reached, or lacks, is no
    pair.

    Mutation: the mean of ratios, or infinity for a seed that was not reached.
    """
    ours = {"0": 1.0, "1": 1.0, "2": 1.0, "3": math.inf, "4": 1.0}
    theirs = {"0": 2.0, "1": 8.0, "2": math.inf, "3": 1.0}
    ratio = cost_ratio(ours, theirs)
    assert ratio.mean == pytest.approx(0.25) and ratio.count == 2
    assert cost_ratio({"0": 1.0}, {"1": 1.0}).count == 0


def test_the_tables_of_a_budget():
    """x reaches 0.6 in 300, 300 and 350 images, y once; none reaches 0.9.

    Mutation: count the runs that did not reach, write infinity, or forget a unit.
    """
    groups = {
        "x": [run(0, 0.2, 0.4, 0.8), run(1, 0.2, 0.4, 0.8), run(2, 0.2, 0.45, 0.65)],
        "y": [run(0, 0.2, 0.4, 0.5, method="y"), run(1, 0.2, 0.4, 0.6, method="y", speed=5.0)],
    }
    table = scores_table(groups, REPORT)
    assert table.columns[:4] == (
        "condition",
        "strict 0.6, runs",
        "strict 0.6, images",
        "strict 0.6, seconds",
    )
    assert table.rows[0][1:5] == ["3 of 3", "300 [300, 350]", "30 [30, 35]", "0 of 3"]
    assert table.rows[1][1:3] == ["1 of 2", "- [400, -]"] and table.rows[1][4:] == [
        "0 of 2",
        "-",
        "-",
    ]
    (row,) = cost_ratio_table(groups, [("x", "y")], REPORT).rows
    # y's median speed is 7.5 images a second, x's 10.
    assert row == ["x against y", "0.75 (1)", "0.562 (1)", "- (0)", "- (0)"]


def test_a_report_with_budgets_compares_at_them():
    """At 400 images x has 0.8 and y 0.5; at 20 s, which are 200 images of x and 100 of y, 0.4 and
    0.3. y's second evaluation of 800 images counts in neither.

    Mutation: compare the ends, or one unit alone.
    """
    study = Study(name="s", stages=(), report=REPORT, simulation={})
    x = [run(seed, 0.2, 0.4, 0.8) for seed in (0, 1)]
    y = [run(seed, 0.2, 0.4, 0.5, 0.9, 0.9, method="y", speed=5.0) for seed in (0, 1)]
    made = {table.stem: table for table in tables(study, {"runs": x + y})}
    assert list(made) == [
        "main",
        "at_images",
        "comparisons_at_images",
        "at_seconds",
        "comparisons_at_seconds",
        "scores",
        "cost_ratios",
    ]
    assert [row[2].mean for row in made["at_images"].rows[1:]] == [0.8, 0.5]
    assert [row[2].mean for row in made["at_seconds"].rows[1:]] == pytest.approx([0.4, 0.3])
    assert made["at_images"].rows[1][3:] == ["400", "40"]
    assert made["at_images"].rows[2][3:] == ["400", "80"]
    gap = {row[0]: row[1] for row in made["comparisons_at_seconds"].rows}
    assert gap["x against y"] == "+0.1"
