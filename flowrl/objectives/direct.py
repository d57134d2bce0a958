"""The direct objective: the reward's own gradient, through the last steps of the sampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flowrl.algorithm import Algorithm, sampler_option
from flowrl.errors import UserError
from flowrl.gaussian import broadcast, mean_square
from flowrl.losses.protocol import DirectLoss
from flowrl.noise import FORWARD, gaussian_noise, on_device
from flowrl.objectives.declared import require_declared
from flowrl.objectives.gate import GateFailed
from flowrl.objectives.micro_batch import MicroBatch
from flowrl.objectives.penalty import with_penalty
from flowrl.objectives.protocol import Context
from flowrl.objectives.rollout_checks import check_no_steps
from flowrl.objectives.step_checks import check_guidance_of_updates, check_last_step
from flowrl.rollout import Velocity
from flowrl.samplers.protocol import Solver
from flowrl.schedule import Interval
from flowrl.types import DirectInputs, LossOutput


class DirectObjective:
    """Training by the gradient of a reward that is differentiable in its images.

    The rollouts are the current policy's and deterministic, drawn and scored without a graph as any
    others are. Of each the state before its last steps is kept, from which a term goes on to the
    data once more with a graph, decodes and asks the scorer. At the rollout's weights that is the
    rollout's own sample, bitwise but for kernels that autograd chooses. Further terms noise the
    sample again; the noise is a function of seed, iteration, sample, optimizer step and term,
    whatever the batch.
    """

    def __init__(self, context: Context) -> None:
        self.check_method(context.algorithm)
        self.context = context
        self.algorithm = context.algorithm
        self.loss = cast(DirectLoss, context.algorithm.loss)
        self.solver = cast(Solver, context.algorithm.sampler)

    @staticmethod
    def check_method(algorithm: Algorithm) -> None:
        """Raise UserError where sampler, steps, penalty and initial noise do not suit the loss."""
        loss = cast(DirectLoss, algorithm.loss)
        likelihood = algorithm.likelihood
        sampler = sampler_option(algorithm.sampler)
        if not isinstance(algorithm.sampler, Solver):
            raise UserError(
                f"loss={loss.name} needs a deterministic rollout, but sampler={sampler}: choose "
                "sampler=ode"
            )
        if loss.last_steps > algorithm.num_steps:
            raise UserError(
                f"loss.last_steps={loss.last_steps} must be at most "
                f"rollout.num_steps={algorithm.num_steps}"
            )
        if loss.last_steps > 1 and _remembers(algorithm.sampler):
            raise UserError(
                f"loss.last_steps={loss.last_steps} begins in the middle of a rollout, where "
                f"sampler={sampler} remembers the step before: choose sampler=ode, or "
                "loss.last_steps=1"
            )
        check_guidance_of_updates(algorithm)
        check_last_step(algorithm)
        check_no_steps(algorithm)
        loss.check(form=likelihood.form, reduction=likelihood.reduction, sampler=sampler)
        # Made-up samples: the names of the loss's metrics are looked at, not its numbers.
        inputs = DirectInputs(torch.zeros(2), torch.ones(2, dtype=torch.bool))
        require_declared(loss, loss(inputs))

    def at_behaviour(self) -> AbstractContextManager[None]:
        return nullcontext()

    @staticmethod
    def steps_of(
        algorithm: Algorithm, *, iteration: int, seed: int, prompt: int
    ) -> tuple[int, ...]:
        """Choose none: the rollouts are deterministic."""
        return ()

    def stochastic_steps(self, iteration: int, prompt: int) -> tuple[int, ...]:
        return ()

    def kept_steps(self, stochastic: tuple[int, ...], iteration: int) -> tuple[int, ...]:
        num_steps = self.algorithm.num_steps
        return (self.loss.first_step(num_steps, iteration=iteration, seed=self.context.seed),)

    @staticmethod
    def num_trained_of(algorithm: Algorithm, *, seed: int) -> int:
        """Count the ways to the data that a method trains each sample on."""
        return 1 + cast(DirectLoss, algorithm.loss).num_noises

    def num_trained(self) -> int:
        return self.num_trained_of(self.algorithm, seed=self.context.seed)

    def num_terms(self, batch: MicroBatch) -> int:
        return self.num_trained()

    def num_rows(self, batch: MicroBatch, index: int, num_optimizer_steps: int) -> int:
        return len(batch.rows)

    def check_gate(self, batch: MicroBatch) -> None:
        """Raise GateFailed unless the kept step, evaluated as an update would, leads to the
        rollout's next state: within a mean square of the tolerance.
        """
        interval = self.algorithm.intervals[batch.trajectory.steps[0]]
        field = batch.conditioned.field(self.context.velocity)
        # As in an update, where autograd may pick other kernels.
        with torch.enable_grad():
            x = batch.trajectory.at("x", 0).contiguous()
            x_next, _ = self.solver.advance(x, field(x, interval.sigma, False), interval, None)
        # A solver that remembers is only asked about its last step, where it has no use for that.
        drift = mean_square(x_next.detach() - batch.trajectory.at("x_next", 0)).max().item()
        # Written with `not`, so that NaN does not pass.
        if not drift <= self.context.gate_tolerance:
            raise GateFailed(
                f"step {batch.trajectory.steps[0]}: evaluating it again moved the next state by a "
                f"mean square of {drift:.2e}, above "
                f"gate_tolerance={self.context.gate_tolerance:g}: rollout and update disagree in "
                "precision, batch shape or mode",
                drift,
            )

    @property
    def kl_threshold(self) -> float | None:
        """Return None: there are no steps that could have a KL."""
        return None

    def replayed_steps(self) -> tuple[int, ...]:
        """Return none: no stochastic step is replayed."""
        return ()

    def allow(self, kl_floor: Mapping[int, float]) -> None:
        """Do nothing: nothing is masked by a KL."""

    def term(self, batch: MicroBatch, index: int, num_optimizer_steps: int) -> LossOutput:
        """Compute loss plus penalty of one way to the data: from the state that the rollout has
        kept, and for terms above 0 from the sample noised again.

        The penalty is that of the first velocity on the way, whose state is a constant, so that it
        pulls on the weights alone.
        """
        number = self._first_step(batch, index)
        x = self._start(batch, index, num_optimizer_steps)
        beta = self.algorithm.penalty.beta
        ref_velocity = None
        if beta:
            # Before there is a graph, which the reference's weights, swapped in place, would break.
            sigma = self.algorithm.intervals[number].sigma
            conditioning = batch.conditioned.conditioning()
            ref_velocity = self.context.reference.velocity(x, sigma, conditioning)
        field = batch.conditioned.field(self.context.velocity)
        x0, velocity = self.finish(field, x, number)
        reward = self.context.score(self.context.decode(x0), batch.prompts)
        output = self.loss(DirectInputs(reward, batch.is_used))
        distance = None
        if ref_velocity is not None:
            distances = self.algorithm.penalty.of_velocities(velocity, ref_velocity)
            distance = torch.where(batch.is_used, distances, 0.0).mean()
        return with_penalty(output.loss, output.metrics, beta=beta, distance=distance)

    def _first_step(self, batch: MicroBatch, index: int) -> int:
        """Return the number of the step that a term begins with."""
        return batch.trajectory.steps[0] if index == 0 else self.algorithm.num_steps - 1

    def _start(
        self, batch: MicroBatch, index: int, num_optimizer_steps: int
    ) -> Float[Tensor, "B *X"]:
        """Return the states that a term begins with, zeros for samples that are not used: behind a
        mask of the rewards alone, what is no number would give 0 times it backwards, which is none.
        """
        if index == 0:
            x = batch.trajectory.at("x", 0)
        else:
            sigma = self.algorithm.intervals[-1].sigma
            noise = self.noise(batch, index, num_optimizer_steps)
            x = torch.lerp(batch.trajectory.x0, noise, sigma)
        return torch.where(broadcast(batch.is_used, x), x, 0.0)

    def noise(
        self, batch: MicroBatch, index: int, num_optimizer_steps: int
    ) -> Float[Tensor, "B *X"]:
        """Draw the noise that takes a micro-batch's samples to the last step's sigma in the
        `index`-th term, from 1 on, whatever the batch.
        """
        # Counted by optimizer step, so that every inner epoch has noise of its own.
        step = FORWARD + num_optimizer_steps * self.loss.num_noises + index - 1
        noise = gaussian_noise(
            self.context.latent_shape,
            seed=self.context.seed,
            iteration=batch.iteration,
            samples=[self.context.member(row) for row in batch.rows],
            step=step,
        )
        return on_device(noise, batch.is_used.device)

    def finish(
        self, field: Velocity, x: Float[Tensor, "B *X"], number: int
    ) -> tuple[Float[Tensor, "B *X"], Float[Tensor, "B *X"]]:
        """Go from the state before step `number` to the data, as `to_data` does."""
        intervals = self.algorithm.intervals[number:]
        is_recomputed = self.context.recomputes()
        return to_data(self.loss.path, self.solver, intervals, field, x, is_recomputed)

    def follow(self, num_optimizer_steps: int) -> None:
        """Do nothing: the behaviour policy is the current one anyway."""

    def weights(self) -> dict[str, Mapping[str, Tensor]]:
        return {}

    def load_weights(self, weights: Mapping[str, dict[str, Tensor]]) -> None:
        """Do nothing: there are no weights to take back."""

    def to(self, device: torch.device) -> None:
        """Do nothing: there are no weights to move."""


def to_data(
    path: Literal["steps", "jump"],
    solver: Solver,
    intervals: Sequence[Interval],
    field: Velocity,
    x: Float[Tensor, "B *X"],
    is_recomputed: bool,
) -> tuple[Float[Tensor, "B *X"], Float[Tensor, "B *X"]]:
    """Go from a state over these steps to the data, or straight there where the path is a jump;
    return the data with the velocity at the state.

    Of several steps each is recomputed in the backward pass where `is_recomputed`, so that one
    step's activations are there at a time.
    """

    def step(x: Tensor, interval: Interval) -> tuple[Tensor, Tensor]:
        velocity = field(x, interval.sigma, False)
        return solver.advance(x, velocity, interval, None)[0], velocity

    first = intervals[0]
    if path == "jump":
        velocity = field(x, first.sigma, False)
        return x - first.sigma * velocity, velocity
    if len(intervals) == 1:
        return step(x, first)
    velocities = []
    for interval in intervals:
        if is_recomputed:
            # Nothing in a step is random.
            x, velocity = checkpoint(
                step, x, interval, use_reentrant=False, preserve_rng_state=False
            )
        else:
            x, velocity = step(x, interval)
        velocities.append(velocity)
    return x, velocities[0]


def _remembers(solver: Solver) -> bool:
    """Tell whether a solver hands something on from one step to the next."""
    state = torch.zeros(1, 1)
    return solver.advance(state, state, Interval(0.75, 0.5, 0.75), None)[1] is not None
