"""The policy under a forward-process loss: deterministic rollouts by an old policy, trained on
noised samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flowrl.losses.nft import NFT
from flowrl.noise import CHOICE, FORWARD, gaussian_noise
from flowrl.training.metric_means import Record
from flowrl.training.micro_batch import MicroBatch
from flowrl.training.policy import Policy
from flowrl.tuning.weights import swapped
from flowrl.types import ForwardInputs


class ForwardPolicy(Policy):
    """Diffusion-NFT's policy: the old policy is a second set of LoRA weights, which follows after
    each iteration.
    """

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        loss = self.algorithm.loss
        assert isinstance(loss, NFT)
        self.loss = loss
        self.old = {
            name: value.detach().clone() for name, value in self.tuning.parameters().items()
        }

    def behaviour(self) -> AbstractContextManager[None]:
        """Rollouts are the old policy's."""
        return swapped(self.tuning.parameters(), self.old)

    def num_terms(self, part: MicroBatch) -> int:
        """One backward pass for each sigma of the grid, of the samples that train on it."""
        return self.algorithm.num_steps

    def term_loss(self, part: MicroBatch, index: int, record: Record) -> Tensor:
        """Loss plus penalty of the micro-batch's samples that train on the grid's `index`-th sigma,
        noised to it.

        Divided by the share of trained sigmas, so that the mean over the grid is one over trained
        terms.
        """
        num_steps = self.algorithm.num_steps
        is_trained = self.is_trained(part)[:, index]
        share = self.loss.num_sigmas(num_steps) / num_steps
        sigma = self.algorithm.intervals[index].sigma
        x0 = part.trajectory.x0
        x = torch.lerp(x0, self.forward_noise(part, index), sigma)
        field = part.group.field(self.velocity)
        with torch.no_grad(), self.behaviour():
            old_velocity = field(x, sigma, False)
        velocity = field(x, sigma, False)
        inputs = ForwardInputs(
            x0,
            x,
            x0.new_full((len(x0),), sigma),
            velocity,
            old_velocity,
            part.advantage,
            part.is_used & is_trained,
        )
        output = self.loss(inputs)
        loss = output.loss / share
        penalty = self.algorithm.penalty
        record.add("loss/policy", loss)
        if penalty.beta:
            gap = velocity - part.group.field(self.reference.velocity)(x, sigma, False)
            distance = torch.where(is_trained, gap.square().mean((1, 2, 3)), 0.0).mean() / share
            loss = loss + penalty.beta * distance
            record.add("loss/penalty", distance)
        for name, value in output.metrics.items():
            record.add(name, value)
        return loss

    def is_trained(self, part: MicroBatch) -> Tensor:
        """Which of the grid's sigmas each sample trains on, [B, K]: a choice at random, the same
        whatever the batch.
        """
        members = [divmod(row, self.plan.group_size) for row in part.rows]
        draw = partial(
            gaussian_noise, [self.algorithm.num_steps], seed=self.seed, iteration=part.iteration
        )
        ranks = draw(samples=members, step=CHOICE + self.num_optimizer_steps).argsort(1).argsort(1)
        return (ranks < self.loss.num_sigmas(self.algorithm.num_steps)).to(self.device)

    def forward_noise(self, part: MicroBatch, index: int) -> Tensor:
        """The noise that takes a micro-batch to its `index`-th sigma, the same whatever the
        batch.
        """
        members = [divmod(row, self.plan.group_size) for row in part.rows]
        draw = partial(
            gaussian_noise, self.model.latent_shape, seed=self.seed, iteration=part.iteration
        )
        # Counted on, so that every inner epoch has noise of its own.
        step = FORWARD + self.num_optimizer_steps * self.algorithm.num_steps + index
        return draw(samples=members, step=step).to(self.device)

    @torch.no_grad()
    def follow(self) -> None:
        """old <- d old + (1 - d) current."""
        decay = self.loss.decay(self.num_optimizer_steps)
        for name, value in self.tuning.parameters().items():
            self.old[name].lerp_(value, 1 - decay)

    def describe_plan(self) -> str:
        """The batch plan in words, with the number of trained sigmas."""
        return self.plan.describe(self.loss.num_sigmas(self.algorithm.num_steps))

    def check_gate(self, part: MicroBatch) -> None:
        """There is no replay to check: nothing of the rollout but its samples is used again."""
        self.has_passed_gate = True

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.old = {name: value.to(self.device) for name, value in self.old.items()}

    def weights(self) -> dict[str, Mapping[str, Tensor]]:
        return super().weights() | {"old": self.old}

    def load_weights(self, weights: Mapping[str, dict[str, Tensor]]) -> None:
        super().load_weights(weights)
        self.old = weights["old"]
