"""A run whose reward is votes: it waits, goes on, and is resumed with the votes that it had."""

import json
import shutil

import pytest
from ballots import vote_on
from PIL import Image
from runs import train
from test_resume import rows

from flowrl.images.pictures import to_pixels
from flowrl.runs.files import read_yaml
from flowrl.votes.files import cast, open_pairs, picture_path, read_pairs
from flowrl.votes.rounds import read_rounds

WORDS = (
    *("debug=smoke", "reward=votes", "num_iterations=3", "viewing.every=0", "checkpoint.keep=3"),
    *("reward.min_votes=4", "reward.pairs=2", "evaluation.max_prompts=2", "evaluation.num_steps=2"),
)


def vote_for_red(folder, limit):
    """Vote on so many open pairs as a person who prefers red would."""
    for pair in open_pairs(folder)[:limit]:
        red = []
        for digest in (pair.left, pair.right):
            pixels = to_pixels(Image.open(picture_path(folder, digest))).astype(float)
            red.append(float((pixels[..., 0] - pixels[..., 1:].mean(-1)).mean()))
        cast(folder, vote_on(pair, "left" if red[0] > red[1] else "right"))


@pytest.fixture(scope="module")
def waited(tmp_path_factory):
    """The folder of a run that has waited in vain, and what it printed."""
    place = tmp_path_factory.mktemp("votes")
    result = train(*WORDS, "reward.wait_seconds=0.1", "run_dir=run", cwd=place)
    return place / "run", result


@pytest.fixture(scope="module")
def finished(waited):
    """The same run, voted on and resumed to its end, with its output."""
    run, _ = waited
    vote_for_red(run / "votes", 5)
    result = train(f"resume={run}", cwd=run.parent)
    assert result.returncode == 0, result.stderr
    return run, result


def test_without_votes_it_says_what_it_waits_for(waited):
    """And, after its limit, how to go on. Mutation: train without a reward, or wait for ever."""
    run, result = waited
    assert result.returncode == 1
    assert "waiting for votes (0 of 4, until" in result.stdout
    assert f"vote with: flowrl vote {run}" in result.stdout
    [line] = result.stderr.strip().splitlines()
    assert line.startswith("error: fewer than 4 votes within reward.wait_seconds=0.1")
    assert f"python train.py resume={run}" in line
    pairs = read_pairs(run / "votes").values()
    # As many as are needed, and those of an iteration more.
    assert len(pairs) == 6 and {pair.iteration for pair in pairs} == {0}
    assert json.loads((run / "votes" / "status.json").read_text())["is_over"]


def test_too_many_votes_for_a_run_are_refused(tmp_path):
    """Mutation: wait for what cannot come."""
    result = train(*WORDS[:2], "reward.min_votes=20", "run_dir=run", cwd=tmp_path)
    assert result.returncode == 1
    assert "reward.min_votes=20: all samples of the run make 8 pairs" in result.stderr


def test_with_votes_it_trains_and_draws_new_pairs(finished):
    """Of each iteration, beside the first ones; its configuration does not say where it lies.
    Mutation: close no album, or keep the folder in the configuration.
    """
    run, result = finished
    assert "iteration 1: 5 votes, 100% agreed with" in result.stdout
    pairs = read_pairs(run / "votes").values()
    assert {pair.iteration for pair in pairs} == {0, 1, 2, 3}
    assert sorted(read_rounds(run)) == [1, 2, 3]
    assert read_yaml(run / "config.yaml", "")["reward"]["folder"] is None
    summary = json.loads((run / "summary.json").read_text())
    for when in ("before", "after"):
        assert 0 < summary["eval"][when]["win_rate"] < 1


def test_a_resumed_run_has_the_votes_that_it_had(finished, tmp_path):
    """Bitwise, whatever was voted since; without the record the new votes count. Mutation: fit to
    all votes, or to none that came later.
    """
    run, _ = finished
    again, anew = tmp_path / "again", tmp_path / "anew"
    for copy in (again, anew):
        shutil.copytree(run, copy)
        vote_for_red(copy / "votes", 3)
        for number in (2, 3):
            shutil.rmtree(copy / "checkpoints" / f"{number:06d}")
    (anew / "votes_used.jsonl").unlink()
    for copy in (again, anew):
        result = train(f"resume={copy}", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    assert rows(again) == rows(run)
    assert read_rounds(again) == read_rounds(run)
    assert read_rounds(anew)[2].num_votes == 8
    assert rows(anew)[1]["reward/mean"] != rows(run)[1]["reward/mean"]
