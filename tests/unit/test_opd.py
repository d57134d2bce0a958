"""On-policy distillation by hand: the loss, its gradient, and which teacher serves which prompt."""

from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch
from each_loss import draw, inputs_of, method, output_of, teacher_velocity

from flowrl.advantages import group
from flowrl.gaussian import GaussianStep, Likelihood
from flowrl.losses.opd import OPD
from flowrl.objectives.lesson import lesson_of
from flowrl.objectives.micro_batch import ConditionedRows, MicroBatch
from flowrl.objectives.protocol import Context
from flowrl.training.learning import Learning
from flowrl.training.teachers import teacher_of
from flowrl.types import Conditioning, Prompt, Trajectory


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_the_loss_is_the_mean_kl(loss_inputs):
    """Whatever advantages and ratios are. Mutation: weigh by advantages, or take a sum."""
    kl = numbers(1.0, 4.0, 10.0).requires_grad_()
    inputs = loss_inputs([0.3, -0.2, 0.0], [5.0, -1.0, 0.0])
    object.__setattr__(inputs, "teacher_kl", kl)
    output = OPD()(inputs)
    assert output.loss.item() == 5.0 and output.metrics == {}
    output.loss.backward()
    assert kl.grad.tolist() == pytest.approx([1 / 3] * 3)


def test_without_a_teacher_there_is_no_loss(loss_inputs):
    """Mutation: take the KL to the old policy instead."""
    with pytest.raises(ValueError, match=r"loss=opd needs LossInputs\.teacher_kl"):
        OPD()(loss_inputs([0.0], [1.0]))


class ByHand:
    """Teachers whose means are given, and who keep what they were asked."""

    def __init__(self, means):
        self.means = means
        self.asked = []

    def name_for(self, prompt):
        return {"circles": "round", "squares": "edged", "cubes": "edged"}[prompt.family]

    def mean(self, batch, places, index, intervals, sampler):
        self.asked.append((list(places), index))
        return self.means[list(places)]


def batch_of(families):
    """A micro-batch of two pixels a sample, of which its prompts' families alone are looked at."""
    count = len(families)
    states = torch.zeros(count, 1, 2, dtype=torch.float64)
    rows = Conditioning({"text": torch.zeros(count, 1)})
    return MicroBatch(
        rows=range(count),
        iteration=0,
        prompts=[Prompt("", family) for family in families],
        conditioned=ConditionedRows(rows, torch.arange(count), range(count)),
        trajectory=Trajectory((1,), False, states, states, states, states[:, 0]),
        score=Future(),
        advantage=torch.zeros(count),
        is_used=torch.ones(count, dtype=torch.bool),
    )


def two_pixels(places, reduction="mean"):
    """Three samples of two pixels at a step of std 1/2, and the lesson of some of them.

    Distances to the teachers are (1, -2), (0, 3) and (2, 0), so |d|^2 is 5, 9 and 4, and KL = |d|^2
    / (2 / 4) is 10, 18 and 8 as a sum, and half of it as a mean over pixels.
    """
    mean = numbers([1.0, 2.0], [0.0, 3.0], [2.0, 1.0]).requires_grad_()
    teachers = ByHand(numbers([0.0, 4.0], [0.0, 0.0], [0.0, 1.0]))
    likelihood = Likelihood(reduction=reduction, form="gaussian")
    context = Context(
        algorithm=replace(method("opd"), likelihood=likelihood),
        velocity=None,
        decode=None,
        score=None,
        recomputes=None,
        reference=None,
        tuning=None,
        latent_shape=(2,),
        member=lambda row: (row, 0),
        seed=0,
        gate_tolerance=0.0,
        teachers=teachers,
    )
    batch = batch_of(("circles", "squares", "cubes"))
    return lesson_of(context, batch, GaussianStep(mean, 0.5), 1, places), mean, teachers


def test_the_kl_of_two_pixels():
    """Mutation: drop the 2, or divide by std alone."""
    lesson, _, teachers = two_pixels([0, 1, 2])
    assert lesson.kl.tolist() == [5.0, 9.0, 4.0]
    assert teachers.asked == [([0, 1, 2], 1)]
    assert two_pixels([0, 1, 2], "sum")[0].kl.tolist() == [10.0, 18.0, 8.0]


def test_each_teacher_has_its_mean_and_its_number_of_samples():
    """Mutation: a mean over all samples, or the number of all."""
    lesson, _, _ = two_pixels([0, 1, 2])
    assert {name: value.item() for name, value in lesson.metrics.items()} == {
        "teacher/kl/round": 5.0,
        "teacher/kl/edged": 6.5,
    }
    assert lesson.counts == {"teacher/kl/round": 1, "teacher/kl/edged": 2}
    assert not any(value.requires_grad for value in lesson.metrics.values())


def test_samples_that_train_on_another_step_are_left_out():
    """Of the last two alone. Mutation: compare their teachers with the first samples' means."""
    lesson, mean, teachers = two_pixels([1, 2])
    assert lesson.kl.tolist() == [9.0, 4.0] and teachers.asked == [([1, 2], 1)]
    assert lesson.counts == {"teacher/kl/edged": 2}
    # d KL / d mean = d / (std^2 D) = 2 d.
    lesson.kl.sum().backward()
    assert mean.grad.tolist() == [[0.0, 0.0], [0.0, 6.0], [4.0, 0.0]]


def test_the_gradient_in_closed_form():
    """gain (mean - teacher_mean) / (B D std^2), with gain = d mean / d velocity: towards the
    teacher. Mutation: flip the sign.
    """
    algorithm = method("opd")
    samples = draw(0.3)
    _, gradient = output_of(algorithm, samples)
    interval = algorithm.intervals[1]
    gain = algorithm.sampler.gain(interval)
    std = inputs_of(algorithm, samples).std
    # Both means belong to one state, so that they differ by the velocities times the gain.
    change = gain * (samples.velocity.detach() - teacher_velocity(samples))
    expected = gain * change / (4 * 18 * std**2)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-15)


def test_a_policy_that_is_its_teacher_has_nothing_to_learn():
    """Exactly. Mutation: a constant beside the distance."""
    algorithm = method("opd")
    samples = draw(0.3)
    same = samples.replace(velocity=teacher_velocity(samples).requires_grad_())
    output, gradient = output_of(algorithm, same)
    assert output.loss.item() == 0 and not gradient.any()


def test_which_teacher_is_for_which_family():
    """Those that name it come before the one of all others, in whatever order they stand.
    Mutation: the first of the list.
    """
    families = {"rest": None, "one": ["a", "b"], "two": ["c"]}
    served = {family: teacher_of(families, family) for family in ("a", "b", "c", "d", "")}
    assert served == {"a": "one", "b": "one", "c": "two", "d": "rest", "": "rest"}
    del families["rest"]
    assert teacher_of(families, "d") is None and teacher_of(families, "") is None


def test_a_run_without_rewards_may_have_learned():
    """Where the loss needs none. Mutation: ask for advantages whatever the loss."""
    alone = group(
        torch.zeros(2, 1), torch.ones(1), torch.tensor([0, 1]), torch.zeros(2, dtype=torch.bool)
    )
    weight = torch.zeros(2)
    for needs_rewards in (False, True):
        learning = Learning(needs_rewards=needs_rewards, needs_advantages=needs_rewards)
        learning.take(False, alone)
        with learning.watch([weight], torch.ones(())):
            weight.add_(1.0)
        if needs_rewards:
            with pytest.raises(RuntimeError, match="no image has a reward"):
                learning.check(1)
        else:
            learning.check(1)
