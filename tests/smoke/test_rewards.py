"""Runs with the rewards that need no weights: a rule-based one, one from an extra, mixtures, and
one that dies.
"""

import csv

import pytest
import torch
from runs import fit, make, train

from flowrl.cli import doctor as doctor_program
from flowrl.errors import UserError
from flowrl.rewards.jpeg import JPEG
from flowrl.rewards.mixture import Mixture
from flowrl.training.reward import RewardModule
from flowrl.types import RewardOutput

TINY = (
    "data.prompts.count=7",
    "evaluation.sets.held_in.count=1",
    "evaluation.sets.held_out.count=1",
)
SIGNS = 'a sign "A"\na red circle "GO"\na blue square "NO"\ntwo crosses "UP"\n'


def rows(run):
    return list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))


@pytest.mark.parametrize("advantage", ["gdpo", "group", "zscore"])
def test_a_mixture_trains(advantage):
    """Shapes and JPEG. Mutation: hand the sum to GDPO, or lose a part's name."""
    policy, data, _ = make("num_threads=1", *TINY, "reward=shapes_jpeg", f"advantage={advantage}")
    before = {name: value.clone() for name, value in policy.tuning.parameters().items()}
    fit(policy, data)
    last = policy.last_metrics
    total = last["reward/part/shapes"] + 0.2 * last["reward/part/jpeg"]
    assert last["reward/mean"] == pytest.approx(total, rel=1e-4)
    assert last["reward/missing"] == 0 and last["advantage/largest"] > 0.1
    assert any(
        not torch.equal(before[name], value) for name, value in policy.tuning.parameters().items()
    )


def test_an_ocr_run(tmp_path):
    """A scorer of an extra, on prompts that quote text, which are evaluated too.

    Mutation: score prompts without a target, or count them as missing.
    """
    pytest.importorskip("rapidocr")
    (tmp_path / "signs.txt").write_text(SIGNS)
    overrides = (
        "reward=ocr",
        "reward.side=64",
        "data=text",
        "data.prompts.path=signs.txt",
        "viewing.every=0",
    )
    result = train("debug=smoke", "num_threads=1", *overrides, cwd=tmp_path)
    # Two iterations of an untrained base draw no text: all rewards are 0, and the run says that it
    # learned nothing.
    assert result.returncode == 1 and "nothing was learned" in result.stderr, result.stderr
    last = rows(tmp_path / "outputs" / "latest")[-1]
    assert 0 <= float(last["reward/mean"]) <= 1 and float(last["reward/missing"]) == 0
    assert float(last["eval/held_in/missing"]) == 0 and 0 <= float(last["eval/held_in/reward"]) <= 1


def test_a_reward_that_judges_no_prompt_is_refused():
    """OCR on captions without quotes. Mutation: train on nothing."""
    pytest.importorskip("rapidocr")
    with pytest.raises(UserError, match=r"could judge none of the .* prompts of data"):
        make("num_threads=1", *TINY, "num_iterations=5", "reward=ocr", "reward.side=64")


def test_a_monitor_that_dies_changes_nothing():
    """The weights after two iterations, bitwise. Mutation: count its failures as missing, or let it
    draw from a shared random stream.
    """

    class Dying:
        calls = 0

        def __call__(self, images, prompts):
            Dying.calls += 1
            if Dying.calls > 1:
                raise ConnectionError("gone")
            return shapes(images, prompts)

    weights = []
    for monitors in ({}, {"monitor": Dying()}):
        policy, data, _ = make("num_threads=1", *TINY)
        shapes = policy.reward.reward
        rest = dict.fromkeys(monitors, 0.0)
        mixture = Mixture(rewards={"shapes": shapes, **monitors}, weights={"shapes": 1.0, **rest})
        policy.__dict__["reward"] = RewardModule(reward=mixture, max_missing=0.0)
        fit(policy, data)
        assert policy.last_metrics["reward/missing"] == 0
        weights.append({name: value.clone() for name, value in policy.tuning.parameters().items()})
    # Micro-batches of two iterations, the last three of them whole, in halves and one by one.
    assert Dying.calls == 1 + 3 * (1 + 2 + 4)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.fixture(scope="module")
def doctor():
    return doctor_program


def test_the_doctor_finds_a_healthy_mixture(doctor, capsys):
    """Mutation: a check that fails on a sound reward."""
    doctor.run(["reward=shapes_jpeg"], None, 60.0)
    table = capsys.readouterr().out
    assert table.count("ordering      ok") == 2 and "FAIL" not in table


def test_the_doctor_expects_of_a_derived_reward_what_it_does_of_its_base(doctor):
    """Mutation: expect nothing of a class that was given another name."""

    class Smaller(JPEG):
        """A reward of one's own."""

    checks = {
        check.name: check.passed
        for check in doctor.examine(Smaller(quality=95, scale=-1.0), None, 60.0)
    }
    assert checks["ordering"] is True
    larger = {
        check.name: check.passed
        for check in doctor.examine(JPEG(quality=95, scale=1.0), None, 60.0)
    }
    assert larger["ordering"] is True


def test_the_doctor_finds_a_sick_reward(doctor, capsys):
    """JPEG size cannot tell a red circle from a blue square. Mutation: report success all the
    same.
    """
    with pytest.raises(ValueError, match="checks failed"):
        doctor.run(["reward=jpeg_compressibility"], ["content"], 0.0)
    table = capsys.readouterr().out
    assert "ordering      FAIL" in table and "latency       FAIL" in table


def test_the_doctor_tells_one_fault_once(doctor, capsys, caplog):
    """And times nothing that failed. Mutation: let every call print the same traceback, or call
    the time until a fault latency.
    """

    class Broken:
        def __call__(self, images, prompts):
            raise TypeError("no such index")

    with doctor.same_failures_once():
        checks = {check.name: check.passed for check in doctor.examine(Broken(), ["size"], 60.0)}
    assert checks["scored"] is False and checks["latency"] is None
    assert [record.exc_info is None for record in caplog.records] == [False]
    # Of six images: three calls of all, one of them as tensors, and one of each by itself.
    told = capsys.readouterr().out
    assert "8 more calls failed in the same way: TypeError: no such index" in told


def test_the_doctor_notices_a_scorer_that_does_not_repeat(doctor):
    """Mutation: compare the first call with itself."""

    class Random:
        def __call__(self, images, prompts):
            return RewardOutput(
                torch.rand(len(prompts)), torch.ones(len(prompts), dtype=torch.bool)
            )

    checks = {check.name: check.passed for check in doctor.examine(Random(), ["size"], 60.0)}
    assert not checks["determinism"] and not checks["batch of one"] and checks["range"]
