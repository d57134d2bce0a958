"""The contract of a loss: over stochastic steps that are replayed, over samples noised again, or
over rewards whose gradient is taken.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flowrl.types import (
    DirectInputs,
    ForwardInputs,
    LogProbForm,
    LossInputs,
    LossOutput,
    Reduction,
)
from flowrl.values.bounds import Natural, NonNegative, Repeats, Share, StepCount
from flowrl.values.check import check_fields
from flowrl.values.portion import portion

Kind = Literal["reverse", "forward", "direct"]


class Loss:
    """The part of the contract that losses of all kinds share.

    A loss is a dataclass whose fields are the options of its YAML file, and a call of it changes
    nothing: before the first rollout it is called on made-up samples. It may state what it needs
    of the method in `check`, define metrics of its own in `metrics`, follow the run in `begin` and
    `observe`, and keep state that a checkpoint saves. The defaults need nothing and keep nothing.
    """

    kind: ClassVar[Kind]
    """The objective that evaluates the loss: that of a ReverseLoss, ForwardLoss or DirectLoss."""

    name: ClassVar[str]
    """The option of `loss=` that messages name."""

    metrics: ClassVar[Mapping[str, str]] = {}
    """Metrics beyond the glossary, by name, with their meaning.

    A private one has a first segment of its own, such as `acme/weight`. The run refuses a loss that
    returns any other name before its first rollout.
    """

    compares: ClassVar[bool] = False
    """True for a loss that compares the samples of a prompt: micro-batches then hold whole groups.
    """

    @property
    def needs_old(self) -> bool:
        """True for a loss that is given the old policy's velocities."""
        return False

    @property
    def needs_reference(self) -> bool:
        """True for a loss that is given the reference's velocities, whether or not they are
        penalised.
        """
        return False

    def num_selected(self, group_size: int) -> int:
        """Count the samples of a group that may train: all of them, unless the loss `compares`.

        Raises UserError where a group has too few for the loss.
        """
        return group_size

    needs_rewards: ClassVar[bool] = True
    """False of a loss that looks at no reward: rewards are then scored for the log alone, and a run
    does not stop for want of them.
    """

    needs_advantages: ClassVar[bool] = True
    """False of a loss that compares no sample with others of its prompt: a sample is then used
    wherever it has a reward of its own, and a prompt may have a single one. Advantages are computed
    for the log alone.
    """

    needs_teachers: ClassVar[bool] = False
    """True of a loss over `LossInputs.teacher_kl`, for which `teachers` must be configured."""

    def check(self, *, form: LogProbForm, reduction: Reduction, sampler: str) -> None:
        """Raise UserError unless the likelihood and the sampler, by name, suit this loss."""

    def check_updates(self, num_updates: int) -> None:
        """Raise UserError unless so many optimizer steps an iteration are enough for this loss."""

    def begin(self, progress: float) -> None:
        """Prepare an iteration's updates; `progress` is the share of the run, in [0, 1), done."""

    def observe(self, metrics: Mapping[str, float], num_updates: int) -> None:
        """Take in the mean metrics of an iteration that made `num_updates` optimizer steps."""

    def state(self) -> dict[str, float]:
        """Return the numbers that a resumed run must be given back."""
        return {}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Take back what `state` gave, or a part of it: perhaps under other options or code."""


class ReverseLoss(Loss, ABC):
    """A loss over the stochastic steps of a rollout, each replayed under the current weights."""

    kind: ClassVar[Kind] = "reverse"

    looks_back: ClassVar[bool] = False
    """True for a loss that needs `LossInputs.earlier_kl`; every sample must then train on all
    stochastic steps."""

    @abstractmethod
    def __call__(self, inputs: LossInputs) -> LossOutput:
        """Compute the loss and its metrics for one step of B samples."""

    @property
    def kl_threshold(self) -> float | None:
        """The threshold on the KL that is in force, for diagnostics; None without one."""
        return None


@dataclass(kw_only=True)
class ForwardLoss(Loss, ABC):
    """A loss over generated samples that are noised again: a function of two velocities there.

    The rollouts are deterministic and drawn by the old policy, which follows the current one: after
    an iteration it becomes d old + (1 - d) current, with d = min(decay_rate max(n - decay_start,
    0), decay_limit) after n optimizer steps. Each sample trains on a `fraction` of the grid's
    sigmas, at least one, picked at random.

    With `compares` the samples of a group train on the same sigmas and are noised alike, and
    `selected` says which of them train.
    """

    kind: ClassVar[Kind] = "forward"

    fraction: Share
    decay_rate: NonNegative
    decay_start: Natural
    decay_limit: Share

    def __post_init__(self) -> None:
        check_fields(self, "loss")

    @property
    def needs_old(self) -> bool:
        return True

    def selected(
        self,
        advantage: Float[Tensor, "B"],
        *,
        group: Int[Tensor, "B"],
        is_used: Bool[Tensor, "B"],
    ) -> Bool[Tensor, "B"]:
        """Tell which samples of whole groups train, all of them unless the loss `compares`; the
        others are not evaluated. A group has at most `num_selected` of them.
        """
        return torch.ones_like(is_used)

    @abstractmethod
    def __call__(self, inputs: ForwardInputs) -> LossOutput:
        """Compute the loss, a mean over all B samples, and its metrics at one sigma."""

    def decay(self, num_optimizer_steps: int) -> float:
        """Compute d, the weight that the old policy keeps after so many optimizer steps."""
        steps_counted = max(num_optimizer_steps - self.decay_start, 0)
        return min(self.decay_rate * steps_counted, self.decay_limit)

    def num_sigmas(self, num_steps: int) -> int:
        """Count the sigmas of a grid of `num_steps` that a sample trains on: the `fraction` of them
        rounded down, at least one.
        """
        return portion(num_steps, self.fraction)


@dataclass(kw_only=True)
class DirectLoss(Loss, ABC):
    """A loss of the rewards themselves, whose gradient goes through the scorer, the autoencoder and
    the last steps of a deterministic rollout, each evaluated once more.

    With `path` steps the gradient goes through all of the `last_steps` steps. With jump it goes
    through a single one of these, drawn anew each iteration, and from there straight to the
    estimate x - sigma v of the data, which the scorer sees in place of the sample. Beside that,
    each sample is noised again `num_noises` times to the last step's sigma, and comes back from
    there in one step.
    """

    kind: ClassVar[Kind] = "direct"
    needs_advantages: ClassVar[bool] = False

    last_steps: StepCount
    path: Literal["steps", "jump"]
    num_noises: Repeats

    def __post_init__(self) -> None:
        check_fields(self, "loss")

    @abstractmethod
    def __call__(self, inputs: DirectInputs) -> LossOutput:
        """Compute the loss, a mean over all B samples, and its metrics."""

    def first_step(self, num_steps: int, *, iteration: int, seed: int) -> int:
        """Return the number of the first step, of a grid of `num_steps`, that has a gradient."""
        first = num_steps - self.last_steps
        if self.path == "steps":
            return first
        rng = random.Random(f"direct {seed} {iteration}")
        return first + rng.randrange(self.last_steps)
