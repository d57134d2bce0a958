"""The interface of an objective: which policy draws rollouts, and what their samples train on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from flowrl.algorithm import Algorithm
from flowrl.objectives.micro_batch import ConditionedRows, ConditionedVelocity, MicroBatch
from flowrl.samplers.protocol import Sampler
from flowrl.schedule import Interval
from flowrl.tuning.protocol import Tuning
from flowrl.types import Conditioning, LossOutput, Prompt, Trajectory

Member = tuple[int, int]
"""A sample of an iteration: its prompt, and its number among the samples of this prompt."""


class Reference(Protocol):
    """The frozen policy that a penalty measures the distance from."""

    def velocity(
        self, x: Float[Tensor, "B *X"], sigma: float, conditioning: Conditioning
    ) -> Float[Tensor, "B *X"]:
        """Evaluate the reference's velocity."""
        ...

    def mean(
        self,
        trajectory: Trajectory,
        index: int,
        conditioned: ConditionedRows,
        intervals: Sequence[Interval],
        sampler: Sampler,
    ) -> Float[Tensor, "B *X"]:
        """Evaluate the reference's mean of the trajectory's `index`-th step."""
        ...


class Teachers(Protocol):
    """The frozen policies that are distilled, each for the prompts of its families."""

    def name_for(self, prompt: Prompt) -> str:
        """Return the name of a prompt's teacher."""
        ...

    def mean(
        self,
        batch: MicroBatch,
        places: Sequence[int],
        index: int,
        intervals: Sequence[Interval],
        sampler: Sampler,
    ) -> Float[Tensor, "N *X"]:
        """Evaluate the teachers' means of the trajectory's `index`-th step for the N samples at
        `places` of a micro-batch, each by the teacher of its prompt.

        Where processes wait for each other in every pass, all must call it alike, also without
        samples.
        """
        ...

    def to(self, device: torch.device) -> object:
        """Move the teachers' weights to a device."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """The policy's side of an objective: the method and the networks.

    `velocity` is the current policy's, at the guidance scale of updates, and `teachers` are there
    where its loss needs them. `latent_shape` is X of one sample. Random choices are a function of
    `seed`, iteration and `member(row)`, the sample that a row is in this iteration.
    `gate_tolerance` bounds the drift that the gate allows.

    `decode` and `score` are the model's decoding and the reward, both with a graph; each raises
    UserError where there is none. `recomputes` tells whether backward passes are to recompute what
    they need, in place of keeping it.
    """

    algorithm: Algorithm
    velocity: ConditionedVelocity
    decode: Callable[[Float[Tensor, "B *X"]], Float[Tensor, "B *F 3 H W"]]
    score: Callable[[Float[Tensor, "B *F 3 H W"], Sequence[Prompt]], Float[Tensor, "B"]]
    recomputes: Callable[[], bool]
    reference: Reference
    tuning: Tuning
    latent_shape: tuple[int, ...]
    member: Callable[[int], Member]
    seed: int
    gate_tolerance: float
    teachers: Teachers | None = None


class Objective(Protocol):
    """One way to train on rollouts: over their stochastic steps, over their samples noised again,
    or through their last steps.
    """

    def __init__(self, context: Context) -> None: ...

    @staticmethod
    def check_method(algorithm: Algorithm) -> None:
        """Raise UserError where the parts of a method do not suit each other."""
        ...

    @staticmethod
    def steps_of(
        algorithm: Algorithm, *, iteration: int, seed: int, prompt: int
    ) -> tuple[int, ...]:
        """Choose the stochastic steps of a method's rollouts, without a policy."""
        ...

    @staticmethod
    def num_trained_of(algorithm: Algorithm, *, seed: int) -> int:
        """Count the steps or sigmas that a method trains each sample on in the first iteration,
        without a policy.
        """
        ...

    def at_behaviour(self) -> AbstractContextManager[None]:
        """Run with the weights of the policy that draws the rollouts."""
        ...

    def stochastic_steps(self, iteration: int, prompt: int) -> tuple[int, ...]:
        """Choose the stochastic steps of the rollouts of an iteration's `prompt`-th prompt."""
        ...

    def kept_steps(self, stochastic: tuple[int, ...], iteration: int) -> tuple[int, ...]:
        """Return the steps of an iteration's rollouts, of which these are stochastic, whose states
        are kept.
        """
        ...

    def num_trained(self) -> int:
        """Count the steps or sigmas that each sample trains on in the first iteration."""
        ...

    def num_terms(self, batch: MicroBatch) -> int:
        """Count the steps or sigmas that any sample of a micro-batch may train on."""
        ...

    def num_rows(self, batch: MicroBatch, index: int, num_optimizer_steps: int) -> int:
        """Count the samples that train on a micro-batch's `index`-th term, in the update after so
        many optimizer steps; a term of none needs no pass.
        """
        ...

    def check_gate(self, batch: MicroBatch) -> None:
        """Raise GateFailed where updates would not reproduce a rollout under its own weights."""
        ...

    @property
    def kl_threshold(self) -> float | None:
        """The threshold of the loss's mask on the KL that is in force; None without one."""
        ...

    def replayed_steps(self) -> tuple[int, ...]:
        """Return the numbers of all steps that updates may replay, in rising order."""
        ...

    def allow(self, kl_floor: Mapping[int, float]) -> None:
        """Let masks count a step's KL from here on from its floor, by the step's number."""
        ...

    def term(self, batch: MicroBatch, index: int, num_optimizer_steps: int) -> LossOutput:
        """Compute loss and metrics of a micro-batch's `index`-th term.

        The mean of the losses over `num_terms` terms is the mean over the trained pairs of a sample
        and a step or sigma.
        """
        ...

    def follow(self, num_optimizer_steps: int) -> None:
        """Let the behaviour policy follow the current one, after an iteration's updates."""
        ...

    def weights(self) -> dict[str, Mapping[str, Tensor]]:
        """Return sets of weights beside the trained ones that a checkpoint needs, by name."""
        ...

    def load_weights(self, weights: Mapping[str, dict[str, Tensor]]) -> None:
        """Take back what `weights` gave, out of all the sets of a checkpoint."""
        ...

    def to(self, device: torch.device) -> None:
        """Move the sets that `weights` returns to a device."""
        ...
