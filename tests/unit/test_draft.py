"""DRaFT's loss by hand, which step it begins with, and its way to the data on two numbers a state.

The velocity there is v = w x, so that an Euler step multiplies x by 1 + w dt. With the grid 1, 3/4,
1/4, 0 the steps' lengths are -1/4, -1/2 and -1/4.
"""

import itertools
import math
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch

from flowrl.advantages import group
from flowrl.algorithm import Algorithm
from flowrl.diagnostics import Diagnostics
from flowrl.gaussian import MEAN_KL
from flowrl.losses.draft import DRaFT
from flowrl.losses.reference import ReferencePenalty
from flowrl.noise import FORWARD, gaussian_noise
from flowrl.objectives.direct import DirectObjective, to_data
from flowrl.objectives.gate import GateFailed
from flowrl.objectives.micro_batch import ConditionedRows, MicroBatch
from flowrl.objectives.protocol import Context
from flowrl.rollout import rollout
from flowrl.samplers.dpm2 import DPM2
from flowrl.samplers.ode import ODE
from flowrl.samplers.steps import AllButLast
from flowrl.samplers.trained import AllStochastic
from flowrl.schedule import Interval
from flowrl.types import Conditioning, DirectInputs, Prompt

SIGMAS = (1.0, 0.75, 0.25, 0.0)
GRID = tuple(Interval(a, b, 0.75) for a, b in itertools.pairwise(SIGMAS))
W = 0.5
X = torch.tensor([[2.0, -1.0], [0.5, 4.0]])
PIXELS = torch.tensor([1.0, 3.0])
"""The weights of the two numbers in the reward."""


def draft(**options):
    plain = {"last_steps": 1, "path": "steps", "num_noises": 0, "reward_cap": math.inf}
    return DRaFT(**plain | options)


def loss_and_gradient(rewards, is_used=(True, True, True), **options):
    reward = torch.tensor(rewards, requires_grad=True)
    loss = draft(**options)(DirectInputs(reward, torch.tensor(is_used))).loss
    (gradient,) = torch.autograd.grad(loss, reward)
    return loss.item(), gradient.tolist()


def test_the_loss_is_minus_the_mean_reward():
    """Mutation: its sign, or a sum."""
    loss, gradient = loss_and_gradient([1.0, 2.0, 6.0])
    assert loss == -3 and gradient == pytest.approx([-1 / 3] * 3)


def test_a_reward_above_the_cap_gives_no_gradient():
    """min(1, 4) + min(4, 4) + min(6, 4) are 9; also below zero. Mutation: drop the cap, or cap
    from below.
    """
    loss, gradient = loss_and_gradient([1.0, 2.0, 6.0], reward_cap=4.0)
    assert loss == pytest.approx(-7 / 3) and gradient == pytest.approx([-1 / 3, -1 / 3, 0])
    loss, gradient = loss_and_gradient([-1.0, -3.0, 6.0], reward_cap=-2.0)
    assert loss == pytest.approx(7 / 3) and gradient == pytest.approx([0, -1 / 3, 0])


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("cap", [math.inf, -2.0])
def test_a_sample_that_is_not_used_counts_as_zero(broken, cap):
    """It is in the mean and gives no gradient. Mutation: average over the others, or let the cap
    stand in for it.
    """
    loss, gradient = loss_and_gradient(
        [-3.0, broken, -6.0], is_used=(True, False, True), reward_cap=cap
    )
    assert loss == pytest.approx(3) and gradient == pytest.approx([-1 / 3, 0, -1 / 3])


@pytest.mark.parametrize("cap", [math.nan, -math.inf])
def test_a_cap_is_a_number(cap):
    """Mutation: no bound."""
    with pytest.raises(ValueError, match=r"loss\.reward_cap"):
        draft(reward_cap=cap)


def test_the_first_step_with_a_gradient():
    """With steps the last K; a jump begins at any of these, by seed and iteration alone.

    Mutation: begin one step later, draw without the iteration, or from all steps.
    """
    assert draft(last_steps=3).first_step(10, iteration=4, seed=0) == 7
    assert draft(last_steps=10).first_step(10, iteration=4, seed=0) == 0
    jump = draft(last_steps=3, path="jump")
    drawn = [jump.first_step(10, iteration=i, seed=0) for i in range(40)]
    assert set(drawn) == {7, 8, 9} and drawn[0] == jump.first_step(10, iteration=0, seed=0)
    assert drawn != [jump.first_step(10, iteration=i, seed=1) for i in range(40)]


class Fixed:
    """The grid of these sigmas."""

    def sigmas(self, num_steps):
        return SIGMAS


class Line:
    """A toy policy: v = w x, pictures that are their latents, a reward linear in them."""

    def __init__(self, loss, *, beta=0.0, sampler=None, recomputes=False, tolerance=0.0):
        self.w = torch.tensor(W, requires_grad=True)
        self.calls = []
        self.algorithm = Algorithm(
            sampler=sampler or ODE(),
            schedule=Fixed(),
            num_steps=len(GRID),
            steps=AllButLast(),
            trained=AllStochastic(),
            guidance_scale=1.0,
            training_guidance_scale=None,
            shared_initial_noise=False,
            credit="trajectory",
            likelihood=MEAN_KL,
            loss=loss,
            penalty=ReferencePenalty(form="velocity", beta=beta, guidance_scale=1.0),
            advantage=group,
            diagnostics=Diagnostics(clip=0.1, delta=0.1),
        )
        self.objective = DirectObjective(
            Context(
                algorithm=self.algorithm,
                velocity=self.velocity,
                decode=lambda x0: x0[:, None, None].expand(-1, 3, 1, 2),
                score=lambda images, prompts: (images[:, 0, 0] * PIXELS).sum(1),
                recomputes=lambda: recomputes,
                reference=SimpleNamespace(velocity=lambda x, sigma, conditioning: 0.25 * x),
                tuning=None,
                latent_shape=(2,),
                member=lambda row: divmod(row, 2),
                seed=3,
                gate_tolerance=tolerance,
            )
        )

    def velocity(self, x, sigma, conditioning):
        self.calls.append(sigma)
        return self.w * x

    def batch(self, is_used=(True, True)):
        """The rollout of both samples from X."""
        conditioned = ConditionedRows(
            Conditioning({"text": torch.zeros(1, 1)}), torch.tensor([0, 0]), [0, 1]
        )
        trajectory = rollout(
            conditioned.field(self.velocity),
            X,
            GRID,
            sampler=self.algorithm.sampler,
            stochastic=(),
            trained=self.objective.kept_steps((), 0),
            noise=lambda k: torch.zeros_like(X),
            shares_start=False,
        )
        self.calls.clear()
        prompts = [Prompt("a"), Prompt("a")]
        score = torch.zeros(2)
        used = torch.tensor(is_used)
        return MicroBatch(range(2), 5, prompts, conditioned, trajectory, Future(), score, used)

    def term(self, batch, index=0):
        """The loss of a term, and its derivative with respect to w."""
        loss = self.objective.term(batch, index, 7).loss
        (gradient,) = torch.autograd.grad(loss, self.w)
        return loss.item(), gradient.item()


def worth(x):
    """The mean reward of states of data."""
    return (x * PIXELS).sum(1).mean().item()


FACTORS = [1 + W * interval.dt for interval in GRID]  # .875, .75, .875


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("last_steps", [1, 2, 3])
def test_the_gradient_goes_through_the_last_steps_alone(last_steps, recomputes):
    """x0 is X times all factors; of the last K, and of these alone, w is a variable:
    d log x0 / d w = sum of dt_k / (1 + w dt_k).

    Mutation: begin a step earlier or later, detach between steps, or lose the sign.
    """
    line = Line(draft(last_steps=last_steps), recomputes=recomputes)
    batch = line.batch()
    loss, gradient = line.term(batch)
    x0 = X * math.prod(FACTORS)
    torch.testing.assert_close(batch.trajectory.x0, x0)
    assert batch.trajectory.steps == (3 - last_steps,)
    assert loss == pytest.approx(-worth(x0))
    pairs = zip(GRID[-last_steps:], FACTORS[-last_steps:], strict=True)
    slope = sum(interval.dt / factor for interval, factor in pairs)
    assert gradient == pytest.approx(-slope * worth(x0))
    # Recomputed, a step is evaluated in the backward pass once more; a single one is not.
    again = last_steps if recomputes and last_steps > 1 else 0
    assert len(line.calls) == last_steps + again


def test_a_jump_goes_straight_to_the_data():
    """From the state before a step, x (1 - sigma w). Mutation: take a step of the solver in place
    of it, or the last step's sigma.
    """
    line = Line(draft(last_steps=3, path="jump"))
    batch = line.batch()
    [number] = batch.trajectory.steps
    x = X * math.prod(FACTORS[:number])
    loss, gradient = line.term(batch)
    sigma = SIGMAS[number]
    assert loss == pytest.approx(-worth(x * (1 - sigma * W)))
    assert gradient == pytest.approx(sigma * worth(x)) and line.calls == [sigma]
    estimate, _ = to_data("jump", ODE(), GRID[1:], lambda x, *_: W * x, X, False)
    torch.testing.assert_close(estimate, X * (1 - 0.75 * W))


def test_samples_are_noised_again():
    """x = 3/4 x0 + 1/4 eps, and back in one step: DRaFT-LV. Every noise is another, and another
    again at the next optimizer step; the sample itself is a constant.

    Mutation: swap the two weights, noise to another sigma, or the same noise for each term.
    """
    line = Line(draft(num_noises=2))
    batch = line.batch()
    assert line.objective.num_terms(batch) == 3
    x0, seen = X * math.prod(FACTORS), []
    for index in (1, 2):
        noise = gaussian_noise(
            (2,), seed=3, iteration=5, samples=[(0, 0), (0, 1)], step=FORWARD + 14 + index - 1
        )
        x = 0.75 * x0 + 0.25 * noise
        loss, gradient = line.term(batch, index)
        assert loss == pytest.approx(-worth(x * (1 - 0.25 * W)))
        assert gradient == pytest.approx(0.25 * worth(x))
        seen.append(noise)
    other = line.objective.noise(batch, 1, 8)
    assert not any(torch.equal(noise, other) for noise in seen)
    assert not torch.equal(seen[0], seen[1])


def test_the_penalty_pulls_at_the_first_state_of_the_way():
    """beta mean (w x - x / 4)^2 there, whose state is a constant. Mutation: leave beta out, or
    measure it at the end of the way.
    """
    for last_steps in (1, 3):
        plain = Line(draft(last_steps=last_steps)).term(Line(draft()).batch())
        line = Line(draft(last_steps=last_steps), beta=0.5)
        batch = line.batch()
        plain = Line(draft(last_steps=last_steps)).term(batch)
        x = X * math.prod(FACTORS[:-last_steps])
        size = x.square().mean().item()
        loss, gradient = line.term(batch)
        assert loss - plain[0] == pytest.approx(0.5 * 0.25**2 * size)
        assert gradient - plain[1] == pytest.approx(0.5 * 2 * 0.25 * size)
    # A sample that is not used counts as 0 in the mean over both.
    batch = Line(draft()).batch(is_used=(True, False))
    x = X * math.prod(FACTORS[:-1])
    gap = Line(draft(), beta=0.5).term(batch)[0] - Line(draft()).term(batch)[0]
    assert gap == pytest.approx(0.5 * 0.25**2 * x[0].square().mean().item() / 2)


@pytest.mark.parametrize("index", [0, 1])
def test_a_sample_that_is_no_number_spoils_nothing(index):
    """A row that is not used gives no gradient, though it and its sample are NaN. Mutation: mask
    the reward alone.
    """
    line = Line(draft(num_noises=1), beta=0.5)
    batch = line.batch(is_used=(True, False))
    expected = line.term(batch, index)
    batch.trajectory.x[1] = math.nan
    batch.trajectory.x0[1] = math.nan
    assert line.term(batch, index) == expected
    assert all(map(math.isfinite, expected)) and expected[1] != 0


@pytest.mark.parametrize("sampler", [ODE(), DPM2()])
def test_the_gate_holds_for_the_rollouts_weights_and_for_no_others(sampler):
    """Mutation: compare with the state before the step, or let NaN pass."""
    line = Line(draft(), sampler=sampler)
    batch = line.batch()
    line.objective.check_gate(batch)
    with torch.no_grad():
        line.w += 0.125
    with pytest.raises(GateFailed, match="step 2") as error:
        line.objective.check_gate(batch)
    # The step's length is -1/4.
    moved = X * FACTORS[0] * FACTORS[1] * 0.125 / 4
    assert error.value.drift == pytest.approx(moved.square().mean(1).max().item(), rel=1e-4)
    with torch.no_grad():
        line.w.fill_(math.nan)
    with pytest.raises(GateFailed):
        line.objective.check_gate(batch)


def test_what_does_not_go_together_is_refused():
    """Noises of a way of several steps, and a solver that remembers from the middle on. Mutation:
    train on something else, in silence.
    """
    for options in ({"last_steps": 2}, {"path": "jump"}):
        with pytest.raises(ValueError, match=r"loss\.num_noises=1 .*loss\.last_steps=1"):
            Line(draft(num_noises=1, **options))
    with pytest.raises(ValueError, match=r"loss\.last_steps=2 .*sampler=ode"):
        Line(draft(last_steps=2), sampler=DPM2())
