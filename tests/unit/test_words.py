"""Slips on the command line are answered by the right form, before Hydra reads it."""

from flowrl.launch.program import run_program

import sys

import pytest

from flowrl.errors import UserError
from flowrl.launch.words import check_words, flags_first

SLIPS = {
    "--seed=1": "--seed=1: overrides have no dashes; write seed=1",
    "--sampler cps": "--sampler cps: overrides have no dashes; write sampler=cps",
    "loss=dppo --num-iterations 5": "--num-iterations 5: overrides have no dashes; "
    "write num_iterations=5",
    "--resume": "--resume: overrides have no dashes; write resume=VALUE",
    "-seed=1": "-seed=1: overrides have no dashes; write seed=1",
    "sampler = cps": "sampler = cps: an override has no spaces; write sampler=cps",
    "sampler= cps": "sampler= cps: an override has no spaces; write sampler=cps",
    "sampler =cps": "sampler =cps: an override has no spaces; write sampler=cps",
    "sampler cps": "sampler cps: write sampler=cps",
    "dance_sde": "dance_sde: an override has the form KEY=VALUE; write sampler=dance_sde",
    "seed": "seed: an override has the form KEY=VALUE; write seed=VALUE",
    "seed -1": "seed: an override has the form KEY=VALUE; write seed=VALUE",
    "seed=0,1 -m loss=dppo": "-m stands between overrides; flags come first: python train.py -m "
    "seed=0,1 loss=dppo ...",
}


@pytest.mark.parametrize("line", SLIPS)
def test_a_slip_is_answered_by_the_right_form(line):
    """Mutation: leave it to Hydra's parser, which prints its usage."""
    with pytest.raises(UserError) as refusal:
        check_words(line.split())
    assert str(refusal.value) == SLIPS[line]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "-m seed=0,1 loss=dppo",
        "seed=0,1 loss=dppo -m",
        "--cfg job --resolve -p loss sampler=cps",
        "--config-dir=conf --config-name mine seed=1",
        "~logger +a=1 ++b=2 name=",
        "name= seed=1",
        "--multi seed=0,1",
        "-cp folder -cn job num_threads=1",
    ],
)
def test_what_hydra_takes_is_let_through(line):
    """Mutation: take a flag's value for an override, or refuse flags behind the overrides."""
    check_words(line.split())


@pytest.mark.parametrize(
    ("line", "ordered"),
    [
        ("seed=1 --config-dir conf", "--config-dir conf seed=1"),
        ("seed=0,1 loss=dppo -m", "-m seed=0,1 loss=dppo"),
        (
            "--cfg job seed=1 --config-dir=a/b --resolve",
            "--cfg job --config-dir=a/b --resolve seed=1",
        ),
        ("-cd conf ~logger +a=1 name=", "-cd conf ~logger +a=1 name="),
        ("seed=1 --config-d conf", "--config-d conf seed=1"),
        ("", ""),
    ],
)
def test_flags_come_first_for_who_appends_overrides(line, ordered):
    """In their order, each with its value. Mutation: leave a flag between overrides, or its value
    behind.
    """
    words = flags_first(line.split())
    assert words == ordered.split()
    check_words([*words, "hydra.output_subdir=null"])


def test_a_program_that_starts_itself_again_has_its_flags_first(monkeypatch):
    """As Lightning does with what stands in `sys.argv`. Mutation: leave that as it was typed."""
    monkeypatch.setattr(sys, "argv", ["train.py", "seed=1", "--config-dir", "conf"])
    seen = []
    assert run_program(lambda: seen.extend(sys.argv[1:]), takes_overrides=True) == 0
    assert seen == ["--config-dir", "conf", "seed=1"]
