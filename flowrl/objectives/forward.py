"""The forward-process objective: samples of an old policy are noised and trained on again."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flowrl.algorithm import Algorithm, option
from flowrl.errors import UserError
from flowrl.losses.protocol import ForwardLoss
from flowrl.noise import CHOICE, FORWARD, gaussian_noise
from flowrl.objectives.declared import require_declared
from flowrl.objectives.micro_batch import MicroBatch
from flowrl.objectives.protocol import Context
from flowrl.samplers.protocol import Solver
from flowrl.tuning.weights import swapped
from flowrl.types import ForwardInputs, LossOutput


class ForwardObjective:
    """Training on generated samples that are noised again.

    The rollouts are those of an old policy, a second set of the trained weights that follows them.
    Every term is one sigma of the grid, for the samples that train on it; the noise that takes them
    there is a function of seed, iteration, sample, optimizer step and sigma, whatever the batch.
    """

    def __init__(self, context: Context) -> None:
        self.check_method(context.algorithm)
        self.context = context
        self.algorithm = context.algorithm
        self.loss = cast(ForwardLoss, context.algorithm.loss)
        weights = context.tuning.parameters()
        self.old = {name: value.detach().clone() for name, value in weights.items()}

    @staticmethod
    def check_method(algorithm: Algorithm) -> None:
        """Raise UserError where sampler, penalty and initial noise do not suit the loss."""
        loss = cast(ForwardLoss, algorithm.loss)
        likelihood = algorithm.likelihood
        sampler = option(algorithm.sampler)
        if not isinstance(algorithm.sampler, Solver):
            raise UserError(
                f"loss={loss.name} needs a deterministic rollout, but sampler={sampler}: choose "
                "sampler=ode or sampler=dpm2"
            )
        if algorithm.penalty.beta and algorithm.penalty.form != "velocity":
            raise UserError(
                f"loss={loss.name} has no steps to compare means of, but "
                f"penalty.form={algorithm.penalty.form}: choose penalty=velocity or penalty=none"
            )
        if algorithm.shared_initial_noise:
            raise UserError(
                f"loss={loss.name} draws equal samples in each group with "
                "rollout.shared_initial_noise=true: set it to false"
            )
        loss.check(form=likelihood.form, reduction=likelihood.reduction, sampler=sampler)
        state = torch.zeros(2, 4, 8, 8)
        one = torch.ones(2)
        is_used = torch.ones(2, dtype=torch.bool)
        inputs = ForwardInputs(state, state, one, state, state, one, is_used)
        require_declared(loss, loss(inputs))

    def behaviour(self) -> AbstractContextManager[None]:
        return swapped(self.context.tuning.parameters(), self.old)

    @staticmethod
    def steps_of(
        algorithm: Algorithm, *, iteration: int, seed: int, prompt: int
    ) -> tuple[int, ...]:
        """Choose none: the rollouts are deterministic."""
        return ()

    def stochastic_steps(self, iteration: int, prompt: int) -> tuple[int, ...]:
        return ()

    def num_trained(self) -> int:
        return self.loss.num_sigmas(self.algorithm.num_steps)

    def num_terms(self, batch: MicroBatch) -> int:
        return self.algorithm.num_steps

    def check(self, batch: MicroBatch) -> None:
        """Do nothing: nothing of the rollout but its samples is used again."""

    def term(self, batch: MicroBatch, index: int, num_optimizer_steps: int) -> LossOutput:
        """Compute loss plus penalty of the samples that train on the grid's `index`-th sigma.

        Divided by the share of trained sigmas, so that the mean over the grid is one over trained
        terms.
        """
        x0 = batch.trajectory.x0
        is_trained = self.is_trained(batch, num_optimizer_steps)[:, index]
        share = self.num_trained() / self.algorithm.num_steps
        sigma = self.algorithm.intervals[index].sigma
        x = torch.lerp(x0, self.noise(batch, index, num_optimizer_steps), sigma)
        field = batch.group.field(self.context.velocity)
        with torch.no_grad(), self.behaviour():
            old_velocity = field(x, sigma, False)
        velocity = field(x, sigma, False)
        inputs = ForwardInputs(
            x0=x0,
            x=x,
            sigma=x0.new_full((len(x0),), sigma),
            velocity=velocity,
            old_velocity=old_velocity,
            advantage=batch.advantage_at(index),
            is_used=batch.is_used & is_trained,
        )
        output = self.loss(inputs)
        loss = output.loss / share
        metrics = {"loss/policy": loss}
        penalty = self.algorithm.penalty
        if penalty.beta:
            reference = batch.group.field(self.context.reference.velocity)
            gap = (velocity - reference(x, sigma, False)).square().mean((1, 2, 3))
            distance = torch.where(is_trained, gap, 0.0).mean() / share
            loss = loss + penalty.beta * distance
            metrics["loss/penalty"] = distance
        return LossOutput(loss, metrics | output.metrics)

    def is_trained(self, batch: MicroBatch, num_optimizer_steps: int) -> Bool[Tensor, "B K"]:
        """Choose at random the sigmas that each sample trains on, the same whatever the batch."""
        shape = [self.algorithm.num_steps]
        draw = partial(gaussian_noise, shape, seed=self.context.seed, iteration=batch.iteration)
        scores = draw(samples=self._members(batch), step=CHOICE + num_optimizer_steps)
        ranks = scores.argsort(1).argsort(1)
        return (ranks < self.num_trained()).to(batch.is_used.device)

    def noise(
        self, batch: MicroBatch, index: int, num_optimizer_steps: int
    ) -> Float[Tensor, "B C H W"]:
        """Draw the noise that takes samples to the `index`-th sigma, whatever the batch."""
        shape = self.context.latent_shape
        draw = partial(gaussian_noise, shape, seed=self.context.seed, iteration=batch.iteration)
        # Counted on, so that every inner epoch has noise of its own.
        step = FORWARD + num_optimizer_steps * self.algorithm.num_steps + index
        return draw(samples=self._members(batch), step=step).to(batch.is_used.device)

    def _members(self, batch: MicroBatch) -> list[tuple[int, int]]:
        """Return each sample's prompt and place in its group, by which its noise is counted."""
        return [divmod(row, self.context.group_size) for row in batch.rows]

    @torch.no_grad()
    def follow(self, num_optimizer_steps: int) -> None:
        """Move the old policy: old <- d old + (1 - d) current."""
        decay = self.loss.decay(num_optimizer_steps)
        for name, value in self.context.tuning.parameters().items():
            self.old[name].lerp_(value, 1 - decay)

    def weights(self) -> dict[str, Mapping[str, Tensor]]:
        return {"old": self.old}

    def load_weights(self, weights: Mapping[str, dict[str, Tensor]]) -> None:
        self.old = weights["old"]

    def to(self, device: torch.device) -> None:
        self.old = {name: value.to(device) for name, value in self.old.items()}
