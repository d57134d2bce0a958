"""The Python API on the embedded model: what a notebook does, against what the programs do."""

import os
import signal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from flowrl.api import load
from flowrl.errors import UserError
from flowrl.losses.dppo import DPPO
from flowrl.rewards.outputs import all_valid
from flowrl.types import Prompt

SMALL = ("debug=smoke", "num_iterations=4", "num_threads=1", "evaluation.num_steps=3")
PROMPTS = ["a red circle", Prompt("two blue squares")]


class Redness:
    """A reward as somebody may write it in a notebook."""

    part_names = ("red",)

    def __call__(self, images, prompts):
        red = images[:, 0].flatten(1).mean(1).cpu()
        return all_valid(red, {"red": red})


@pytest.fixture(scope="module")
def trained():
    """An experiment after two iterations, with what was drawn before them."""
    experiment = load(*SMALL, reward=Redness())
    before = experiment.draw(PROMPTS, count=2)
    rows = experiment.train(2)
    return experiment, before, rows


def test_images_are_those_of_prompts_and_seed(trained):
    """Prompt by prompt; the reference draws what the policy drew before training. Mutation: draw
    the reference with the average, or the average as the reference.
    """
    experiment, before, _ = trained
    assert before.shape == (4, 3, 32, 32) and before.min() >= 0 and before.max() <= 1
    assert experiment.draw(PROMPTS, count=2, is_reference=True).equal(before)
    assert experiment.draw(PROMPTS[0], count=2, is_reference=True).equal(before[:2])
    assert not experiment.draw(PROMPTS, count=2).equal(before)
    assert not experiment.draw(PROMPTS, count=2, seed=1, is_reference=True).equal(before)


def test_scores_are_the_rewards(trained):
    """Mutation: score each image as the first prompt's, or take any number of images."""
    experiment, before, _ = trained
    output = experiment.score(before, PROMPTS)
    assert torch.allclose(output.values, before[:, 0].flatten(1).mean(1))
    assert output.values.equal(output.parts["red"])
    with pytest.raises(UserError, match="4 images of 3 prompts"):
        experiment.score(before, ["a", "b", "c"])


def test_training_goes_on_where_it_ended(trained):
    """Two iterations twice are four, bitwise, with the optimizer's state and the rate's course.
    Mutation: begin the optimizer anew, or the iterations.
    """
    experiment, _, rows = trained
    rows = rows + experiment.train(2)
    whole = load(*SMALL, reward=Redness())
    told = []
    assert whole.train(4, told.append) == told == whole.history
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4]
    for row, other in zip(rows, told, strict=True):
        for key, value in other.items():
            assert key.startswith("perf/") or row[key] == value, key
    for key, value in whole.policy.ema.weights.items():
        assert experiment.policy.ema.weights[key].equal(value)
    with pytest.raises(UserError, match="0 of num_iterations=4 are left"):
        experiment.train(1)


def test_what_is_saved_is_what_is_drawn(trained, tmp_path):
    """Mutation: save the weights as trained, not their average, or
    delete what lies in the way."""
    experiment, *_ = trained
    folder = experiment.save(tmp_path / "mine")
    (file,) = folder.glob("*.safetensors")
    saved = sorted(float(value.float().norm()) for value in load_file(file).values())
    averages = sorted(float(value.norm()) for value in experiment.policy.ema.weights.values())
    assert saved == pytest.approx(averages)
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata()["flowrl.reward"] == "Redness"
    assert experiment.save(tmp_path / "mine") == folder
    (folder / "notes.txt").touch()
    with pytest.raises(UserError, match=r"holds notes\.txt, too"):
        experiment.save(tmp_path / "mine")
    assert (folder / "notes.txt").exists()
    sheet = experiment.pictures(PROMPTS)
    assert sheet.mode == "RGB" and sheet.width > sheet.height
    metrics = experiment.evaluate()
    assert {"eval/held_in/reward", "eval/held_in/part/red"} <= metrics.keys()


def test_a_loss_and_a_wrong_word(capfd):
    """The loss that is given is the one that trains, in silence. Mutation: build the configured
    one, or let Lightning talk.
    """

    class Mine(DPPO):
        def __call__(self, inputs):
            calls.append(len(inputs.advantage))
            return super().__call__(inputs)

    calls = []
    loss = Mine(
        delta=1e-5,
        final_delta=None,
        kl_budget=None,
        divergence="kl",
        calibrated_for="kl",
        advantage_clip=5.0,
    )
    experiment = load(*SMALL, loss=loss, reward=Redness())
    experiment.train(1)
    assert calls
    assert "".join(capfd.readouterr()) == ""
    with pytest.raises(UserError, match="devices=2"):
        load(*SMALL, "trainer=ddp")
    with pytest.raises(UserError, match="resume=outputs/x: an experiment in Python has no run"):
        load("resume=outputs/x")


def test_an_interrupt_ends_after_the_iteration():
    """And the experiment goes on from there. Mutation: raise it within the iteration."""
    experiment = load(*SMALL)
    before = signal.getsignal(signal.SIGINT)

    def interrupt(row):
        if row["iteration"] == 1:
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
            signal.setitimer(signal.ITIMER_REAL, 0.05)

    with pytest.raises(KeyboardInterrupt):
        experiment.train(4, interrupt)
    assert 2 <= len(experiment.history) < 4
    assert signal.getsignal(signal.SIGINT) is before
    experiment.train(1)
    numbers = [row["iteration"] for row in experiment.history]
    assert numbers == list(range(1, len(numbers) + 1))
