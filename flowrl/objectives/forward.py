"""The forward-process objective: samples of an old policy are noised and trained on again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flowrl.algorithm import Algorithm, sampler_option
from flowrl.errors import UserError
from flowrl.losses.protocol import ForwardLoss
from flowrl.losses.used import velocity_distance
from flowrl.noise import CHOICE, FORWARD, gaussian_noise, on_device
from flowrl.objectives.declared import require_declared
from flowrl.objectives.micro_batch import MicroBatch
from flowrl.objectives.penalty import with_penalty
from flowrl.objectives.protocol import Context, Member
from flowrl.objectives.rollout_checks import check_no_steps
from flowrl.samplers.protocol import Solver
from flowrl.tuning.weights import swapped
from flowrl.types import ForwardInputs, LossOutput


class ForwardObjective:
    """Training on generated samples that are noised again.

    The rollouts are those of an old policy, a second set of the trained weights that follows them.
    Every term is one sigma of the grid, for the samples that train on it; the noise that takes them
    there is a function of seed, iteration, sample, optimizer step and sigma, whatever the batch;
    for a loss that compares the samples of a prompt, all of these have their first one's noise and
    sigmas.
    """

    def __init__(self, context: Context) -> None:
        self.check_method(context.algorithm)
        self.context = context
        self.algorithm = context.algorithm
        self.loss = cast(ForwardLoss, context.algorithm.loss)
        weights = context.tuning.parameters()
        self.old = {name: value.detach().clone() for name, value in weights.items()}
        # The choice of sigmas of an optimizer step, by the samples of a micro-batch.
        self._step = (-1, -1)
        self._chosen: dict[tuple[Member, ...], Bool[Tensor, "B K"]] = {}

    @staticmethod
    def check_method(algorithm: Algorithm) -> None:
        """Raise UserError where sampler, penalty and initial noise do not suit the loss."""
        loss = cast(ForwardLoss, algorithm.loss)
        likelihood = algorithm.likelihood
        sampler = sampler_option(algorithm.sampler)
        if not isinstance(algorithm.sampler, Solver):
            raise UserError(
                f"loss={loss.name} needs a deterministic rollout, but sampler={sampler}: choose "
                "sampler=ode or sampler=dpm2"
            )
        check_no_steps(algorithm)
        loss.check(form=likelihood.form, reduction=likelihood.reduction, sampler=sampler)
        # Made-up samples: the names of the loss's metrics are looked at, not its numbers.
        state = torch.zeros(2, 4, 8, 8)
        inputs = ForwardInputs(
            x0=state,
            x=state,
            sigma=torch.ones(2),
            velocity=state,
            old_velocity=state,
            advantage=torch.ones(2),
            is_used=torch.ones(2, dtype=torch.bool),
            ref_velocity=state,
            group=torch.zeros(2, dtype=torch.long),
            group_size=2,
        )
        require_declared(loss, loss(inputs))

    def at_behaviour(self) -> AbstractContextManager[None]:
        return swapped(self.context.tuning.parameters(), self.old)

    @staticmethod
    def steps_of(
        algorithm: Algorithm, *, iteration: int, seed: int, prompt: int
    ) -> tuple[int, ...]:
        """Choose none: the rollouts are deterministic."""
        return ()

    def stochastic_steps(self, iteration: int, prompt: int) -> tuple[int, ...]:
        return ()

    def kept_steps(self, stochastic: tuple[int, ...], iteration: int) -> tuple[int, ...]:
        return ()

    @staticmethod
    def num_trained_of(algorithm: Algorithm, *, seed: int) -> int:
        """Count the sigmas that a method trains each sample on."""
        return cast(ForwardLoss, algorithm.loss).num_sigmas(algorithm.num_steps)

    def num_trained(self) -> int:
        return self.num_trained_of(self.algorithm, seed=self.context.seed)

    def num_terms(self, batch: MicroBatch) -> int:
        return self.algorithm.num_steps

    def num_rows(self, batch: MicroBatch, index: int, num_optimizer_steps: int) -> int:
        return len(self.trained_rows(batch, index, num_optimizer_steps))

    def check_gate(self, batch: MicroBatch) -> None:
        """Do nothing: nothing of the rollout but its samples is used again."""

    @property
    def kl_threshold(self) -> float | None:
        """Return None: there are no steps that could have a KL."""
        return None

    def replayed_steps(self) -> tuple[int, ...]:
        """Return none: samples are noised again, and no step is replayed."""
        return ()

    def allow(self, kl_floor: Mapping[int, float]) -> None:
        """Do nothing: nothing is masked by a KL."""

    def term(self, batch: MicroBatch, index: int, num_optimizer_steps: int) -> LossOutput:
        """Compute loss plus penalty of the samples that train on the grid's `index`-th sigma.

        Nothing is evaluated of the others. Both are means over the samples that train on it, times
        their share of all samples that may train times the number of terms over the number of
        sigmas that a sample trains on: the mean over terms is then one over trained pairs of sample
        and sigma. Where a loss compares samples, those that it could have selected count as 0.
        """
        rows = self.trained_rows(batch, index, num_optimizer_steps)
        # Where processes wait for each other a term may be asked for that none of the samples
        # trains on: it passes through the networks with one that counts for nothing.
        asked = rows or [0]
        places = on_device(torch.tensor(asked), batch.is_used.device)
        x0 = batch.trajectory.x0.index_select(0, places)
        sigma = self.algorithm.intervals[index].sigma
        noise = self.noise(batch, asked, index, num_optimizer_steps)
        x = torch.lerp(x0, noise, sigma)
        conditioning = batch.conditioned.conditioning(places)
        # The old policy comes first: its weights are swapped in place, which would break the graph
        # of a velocity that was computed before.
        old_velocity = torch.full_like(x, torch.nan)
        if self.loss.needs_old:
            with torch.no_grad(), self.at_behaviour():
                old_velocity = self.context.velocity(x, sigma, conditioning)
        velocity = self.context.velocity(x, sigma, conditioning)
        ref_velocity = None
        if self.algorithm.needs_reference:
            ref_velocity = self.context.reference.velocity(x, sigma, conditioning)
        if not rows:
            # A backward pass without a gradient.
            return LossOutput(torch.where(torch.zeros_like(x).bool(), velocity, 0.0).sum(), {})
        inputs = ForwardInputs(
            x0=x0,
            x=x,
            sigma=x0.new_full((len(x0),), sigma),
            velocity=velocity,
            old_velocity=old_velocity,
            advantage=batch.advantage_at(index).index_select(0, places),
            is_used=batch.is_used.index_select(0, places),
            ref_velocity=ref_velocity,
            group=on_device(self.groups(batch)[asked], batch.is_used.device),
            group_size=self._group_size(batch),
        )
        total = self._penalised(inputs)
        share = len(rows) / self._num_candidates(batch)
        num_terms = self.num_terms(batch)
        return replace(total, loss=total.loss * (share * num_terms / self.num_trained()))

    def _penalised(self, inputs: ForwardInputs) -> LossOutput:
        """Compute the loss plus penalty of samples, with the distance from the old policy, where it
        is evaluated, among the metrics.
        """
        # Before the loss: autograd adds the two gradients of the velocity in this order.
        penalty = self.algorithm.penalty
        distance = None
        if penalty.beta:
            assert inputs.ref_velocity is not None
            distance = penalty.of_velocities(inputs.velocity, inputs.ref_velocity).mean()
        output = self.loss(inputs)
        metrics = output.metrics
        if self.loss.needs_old:
            metrics = metrics | {"trust/velocity_old": velocity_distance(inputs)}
        return with_penalty(output.loss, metrics, beta=penalty.beta, distance=distance)

    def groups(self, batch: MicroBatch) -> Int[Tensor, "B"]:
        """Return the prompts of a micro-batch's samples, by number, on the CPU."""
        return torch.tensor([self.context.member(row)[0] for row in batch.rows])

    def _group_size(self, batch: MicroBatch) -> int | None:
        """Return the samples of each group, where the loss needs whole ones."""
        if not self.loss.compares:
            return None
        return len(batch.rows) // len(self.groups(batch).unique())

    def _num_candidates(self, batch: MicroBatch) -> int:
        """Count the samples of a micro-batch that may train, whatever their advantages."""
        group_size = self._group_size(batch)
        if group_size is None:
            return len(batch.rows)
        return len(batch.rows) // group_size * self.loss.num_selected(group_size)

    def trained_rows(self, batch: MicroBatch, index: int, num_optimizer_steps: int) -> list[int]:
        """Return the places in a micro-batch of the samples that train on the `index`-th sigma."""
        step = (batch.iteration, num_optimizer_steps)
        if self._step != step:
            self._step = step
            self._chosen.clear()
        # Not by their rows, of which scouting chooses the samples anew after a rehearsal.
        members = tuple(self.context.member(row) for row in batch.rows)
        if members not in self._chosen:
            self._chosen[members] = self.is_trained(batch, num_optimizer_steps)
        chosen = self._chosen[members][:, index]
        if self.loss.compares:
            chosen = chosen & self._selected(batch, index)
        return chosen.nonzero().flatten().tolist()

    def _selected(self, batch: MicroBatch, index: int) -> Bool[Tensor, "B"]:
        """Tell, on the CPU, which samples the loss selects by their advantages at a sigma."""
        advantage = batch.advantage_at(index).cpu()
        return self.loss.selected(advantage, group=self.groups(batch), is_used=batch.is_used.cpu())

    def is_trained(self, batch: MicroBatch, num_optimizer_steps: int) -> Bool[Tensor, "B K"]:
        """Choose at random the sigmas that each sample may train on, whatever the batch."""
        every_row = range(len(batch.rows))
        step = CHOICE + num_optimizer_steps
        scores = self._draw(batch, every_row, [self.algorithm.num_steps], step)
        # The argsort of an argsort is each sigma's rank among a sample's scores, so this picks
        # `num_trained` of them uniformly.
        ranks = scores.argsort(1).argsort(1)
        return ranks < self.num_trained()

    def noise(
        self, batch: MicroBatch, places: Sequence[int], index: int, num_optimizer_steps: int
    ) -> Float[Tensor, "B *X"]:
        """Draw the noise that takes the samples at `places` of a micro-batch to the `index`-th
        sigma, whatever the batch.
        """
        # Counted by optimizer step, so that every inner epoch has noise of its own.
        step = FORWARD + num_optimizer_steps * self.algorithm.num_steps + index
        noise = self._draw(batch, places, self.context.latent_shape, step)
        return on_device(noise, batch.is_used.device)

    def _draw(
        self, batch: MicroBatch, places: Sequence[int], shape: Sequence[int], step: int
    ) -> Float[Tensor, "B ..."]:
        """Draw one row of noise for each of the samples at `places`, on the CPU."""
        return gaussian_noise(
            shape,
            seed=self.context.seed,
            iteration=batch.iteration,
            samples=[self._drawn_as(batch.rows[place]) for place in places],
            step=step,
        )

    def _drawn_as(self, row: int) -> tuple[int, int]:
        """Return the prompt and the place in its group of the sample whose noise a sample has."""
        prompt, place = self.context.member(row)
        return (prompt, 0) if self.loss.compares else (prompt, place)

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
