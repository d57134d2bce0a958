"""The reverse-process objective: trained steps are replayed under the current weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from flowrl.algorithm import Algorithm, sampler_option
from flowrl.errors import UserError
from flowrl.gaussian import GaussianStep, tv, velocity_change
from flowrl.losses.protocol import ReverseLoss
from flowrl.noise import on_device
from flowrl.objectives.declared import require_declared
from flowrl.objectives.gate import check_replay
from flowrl.objectives.lesson import lesson_of
from flowrl.objectives.micro_batch import MicroBatch
from flowrl.objectives.pair import paired
from flowrl.objectives.penalty import with_penalty
from flowrl.objectives.protocol import Context, Member
from flowrl.objectives.step_checks import (
    check_branches,
    check_guidance_of_updates,
    check_number,
    check_penalty,
    check_step,
    check_trained,
)
from flowrl.rollout import replay
from flowrl.samplers.protocol import HasPublishedStd
from flowrl.types import LossInputs, LossOutput, Trajectory


@dataclass(frozen=True, slots=True)
class TrainedRows:
    """The rows of a micro-batch that train on each step of the grid.

    `by_step` lists the rows, counted from 0, by the step's number, and lacks a step that no row
    trains on. `num_trained` counts the steps of each row.
    """

    by_step: Mapping[int, list[int]]
    num_trained: int

    def at(self, step_number: int) -> list[int]:
        """Return the rows that train on a step of the grid."""
        return self.by_step.get(step_number, [])


class ReverseObjective:
    """Policy gradients over stochastic steps.

    The rollouts are the current policy's, and every term is one step of them, for the samples that
    train on it: all of a micro-batch pass through the network, in the rollout's batch shape.
    """

    def __init__(self, context: Context) -> None:
        self.check_method(context.algorithm)
        self.context = context
        self.algorithm = context.algorithm
        self.loss = cast(ReverseLoss, context.algorithm.loss)
        self.allowed: Mapping[int, float] = {}
        # Of one iteration at a time: every term asks again for what its micro-batch drew.
        self._iteration = -1
        self._trained_rows: dict[tuple[Member, ...], TrainedRows] = {}
        # The KLs of the terms of an update that came before, for a loss that looks back.
        self._kls: dict[range, list[Float[Tensor, "B"]]] = {}

    @staticmethod
    def check_method(algorithm: Algorithm) -> None:
        """Raise UserError where sampler, steps, likelihood and loss do not suit each other."""
        likelihood = algorithm.likelihood
        sampler = sampler_option(algorithm.sampler)
        if likelihood.form == "unnormalised" and sampler != "cps":
            raise UserError(
                f"likelihood.form=unnormalised (loss=cps) needs sampler=cps, not {sampler}: it "
                "leaves out 1 / (2 std^2), to which published ranges are blind"
            )
        algorithm.loss.check(form=likelihood.form, reduction=likelihood.reduction, sampler=sampler)
        candidates = algorithm.steps.candidates(algorithm.num_steps)
        if not candidates:
            raise UserError(
                f"steps: no stochastic step among rollout.num_steps={algorithm.num_steps}; a ratio "
                "loss needs one"
            )
        for number in candidates:
            check_number(algorithm, number)
        for number in algorithm.trained.candidates(candidates):
            check_step(algorithm, number)
        check_guidance_of_updates(algorithm)
        check_branches(algorithm)
        check_penalty(algorithm)
        loss = cast(ReverseLoss, algorithm.loss)
        drawn = ReverseObjective.steps_of(algorithm, iteration=0, seed=0, prompt=0)
        # A choice of one's own may promise other candidates than it draws.
        if not set(drawn) <= set(candidates):
            raise UserError(f"steps: {drawn} were drawn, which are not among {candidates}")
        check_trained(algorithm, drawn)
        # Made-up samples: the names of the loss's metrics are looked at, not its numbers.
        zero = torch.zeros(2)
        inputs = LossInputs(
            log_ratio=zero,
            advantage=zero,
            kl=zero,
            tv=zero,
            velocity_change=zero,
            std=1.0,
            dt=-1.0,
            form=likelihood.form,
            reduction=likelihood.reduction,
            dimensions=1,
            teacher_kl=zero if loss.needs_teachers else None,
            pair_log_ratio=zero if loss.compares else None,
        )
        require_declared(loss, loss(inputs))

    def at_behaviour(self) -> AbstractContextManager[None]:
        return nullcontext()

    @staticmethod
    def steps_of(
        algorithm: Algorithm, *, iteration: int, seed: int, prompt: int
    ) -> tuple[int, ...]:
        """Choose the stochastic steps of a method's rollouts."""
        return algorithm.steps.draw(algorithm.num_steps, iteration, seed, prompt)

    def stochastic_steps(self, iteration: int, prompt: int) -> tuple[int, ...]:
        seed = self.context.seed
        return self.steps_of(self.algorithm, iteration=iteration, seed=seed, prompt=prompt)

    def kept_steps(self, stochastic: tuple[int, ...], iteration: int) -> tuple[int, ...]:
        return self.algorithm.trained.candidates(stochastic)

    @staticmethod
    def num_trained_of(algorithm: Algorithm, *, seed: int) -> int:
        """Count the steps that a method trains each sample on in the first iteration."""
        # Any prompt and sample: all of an iteration have as many.
        stochastic = algorithm.steps.draw(algorithm.num_steps, 0, seed, 0)
        return len(algorithm.trained.draw(stochastic, 0, seed, 0, 0))

    def num_trained(self) -> int:
        return self.num_trained_of(self.algorithm, seed=self.context.seed)

    def num_terms(self, batch: MicroBatch) -> int:
        return len(batch.trajectory.steps)

    def num_rows(self, batch: MicroBatch, index: int, num_optimizer_steps: int) -> int:
        return len(self._trained(batch).at(batch.trajectory.steps[index]))

    def _trained(self, batch: MicroBatch) -> TrainedRows:
        """Return which rows of a micro-batch train on which steps, drawn once an iteration."""
        if self._iteration != batch.iteration:
            self._iteration = batch.iteration
            self._trained_rows.clear()
            self._kls.clear()
        # By the samples, not by their rows: scouting chooses these anew after a rehearsal.
        members = tuple(self.context.member(row) for row in batch.rows)
        if members not in self._trained_rows:
            self._trained_rows[members] = self._draw_trained(members, batch.iteration)
        return self._trained_rows[members]

    def _draw_trained(self, members: Sequence[Member], iteration: int) -> TrainedRows:
        """Draw the steps that each of these samples trains on.

        Raises UserError where samples train on different numbers of steps.
        """
        algorithm = self.algorithm
        # The same for all of them: micro-batches are split where prompts differ in their steps.
        stochastic = self.stochastic_steps(iteration, members[0][0])
        draws = [
            algorithm.trained.draw(stochastic, iteration, self.context.seed, prompt, sample)
            for prompt, sample in members
        ]
        counts = {len(drawn) for drawn in draws}
        if len(counts) > 1 or 0 in counts:
            raise UserError(
                f"trained: samples train on {sorted(counts)} steps; each must train on as many as "
                "any other, and on one at least"
            )
        by_step: dict[int, list[int]] = defaultdict(list)
        for place, drawn in enumerate(draws):
            for number in drawn:
                by_step[number].append(place)
        return TrainedRows(dict(by_step), counts.pop())

    def check_gate(self, batch: MicroBatch) -> None:
        check_replay(
            batch.trajectory,
            partial(self.replay, batch),
            self.algorithm.likelihood,
            self.context.gate_tolerance,
        )

    @property
    def kl_threshold(self) -> float | None:
        return self.loss.kl_threshold

    def replayed_steps(self) -> tuple[int, ...]:
        stochastic = self.algorithm.steps.candidates(self.algorithm.num_steps)
        return tuple(sorted(self.algorithm.trained.candidates(stochastic)))

    def allow(self, kl_floor: Mapping[int, float]) -> None:
        self.allowed = dict(kl_floor)

    def replay(self, batch: MicroBatch, index: int) -> GaussianStep:
        """Evaluate the Gaussian of a micro-batch's `index`-th trained step as it is now."""
        field = batch.conditioned.field(self.context.velocity)
        return replay(
            field, batch.trajectory, index, self.algorithm.intervals, self.algorithm.sampler
        )

    def term(self, batch: MicroBatch, index: int, num_optimizer_steps: int) -> LossOutput:
        """Compute policy loss plus reference penalty at one trained step.

        Both are means over the samples that train on it, times their share of all and the terms for
        each step that a sample trains on, so that the mean over terms is one over trained pairs.
        """
        step = self.replay(batch, index)
        trajectory = batch.trajectory
        number = trajectory.steps[index]
        inputs = loss_inputs(self.algorithm, step, trajectory, index, batch.advantage_at(index))
        inputs = replace(inputs, kl_floor=self.allowed.get(number, 0.0))
        trained = self._trained(batch)
        inputs = self._look_back(inputs, batch, index)
        if self.loss.compares:
            inputs = self._paired(inputs, batch, step, index)
        distance = self._distance(batch, step, index)
        rows = trained.at(number)
        lesson = lesson_of(self.context, batch, step, index, rows)
        if not rows:
            # A backward pass without a gradient, for processes that wait for it.
            is_trained = torch.zeros_like(inputs.log_ratio, dtype=torch.bool)
            return LossOutput(torch.where(is_trained, inputs.log_ratio, 0.0).sum(), {})
        if len(rows) < len(batch.rows):
            places = on_device(torch.tensor(rows), inputs.advantage.device)
            inputs = inputs.of_rows(places)
            distance = None if distance is None else distance.index_select(0, places)
        if lesson is not None:
            inputs = replace(inputs, teacher_kl=lesson.kl)
        output = self.loss(inputs)
        metrics = output.metrics | self.diagnose(inputs, number)
        if lesson is not None:
            metrics |= lesson.metrics
        total = with_penalty(
            output.loss,
            metrics,
            beta=self.algorithm.penalty.beta,
            distance=None if distance is None else distance.mean(),
        )
        share = len(rows) / len(batch.rows)
        num_terms = self.num_terms(batch)
        return replace(
            total,
            loss=total.loss * (share * num_terms / trained.num_trained),
            counts={} if lesson is None else lesson.counts,
        )

    def _look_back(self, inputs: LossInputs, batch: MicroBatch, index: int) -> LossInputs:
        """Add the KLs of a trajectory's earlier steps for a loss that looks at them, and keep this
        one's: an update's terms come in the order of the steps. Earlier ones that were not asked
        for, as in a rehearsal, which evaluates a single term, count as 0.
        """
        if not self.loss.looks_back:
            return inputs
        kl = (inputs.kl - inputs.kl_floor).clamp(min=0).detach()
        earlier = self._kls.get(batch.rows, [])[:index]
        earlier += [torch.zeros_like(kl)] * (index - len(earlier))
        self._kls[batch.rows] = [*earlier, kl]
        so_far = torch.stack(earlier, 1) if earlier else kl.new_zeros(len(kl), 0)
        return replace(inputs, earlier_kl=so_far, num_steps=self.num_terms(batch))

    def _paired(
        self, inputs: LossInputs, batch: MicroBatch, step: GaussianStep, index: int
    ) -> LossInputs:
        """Compare the samples of whole groups in pairs."""
        trajectory = batch.trajectory
        gain = self.algorithm.sampler.gain(self.algorithm.intervals[trajectory.steps[index]])
        return paired(
            inputs,
            # A step's mean is linear in the velocity.
            moved=(step.mean - trajectory.at("old_mean", index)) / gain,
            x0=trajectory.x0.float(),
            is_used=batch.is_used,
            members=[self.context.member(row) for row in batch.rows],
        )

    def _distance(
        self, batch: MicroBatch, step: GaussianStep, index: int
    ) -> Float[Tensor, "B"] | None:
        """Compute the samples' distances from the reference, which are penalised; None without
        penalty.
        """
        penalty = self.algorithm.penalty
        if not penalty.beta:
            return None
        trajectory = batch.trajectory
        intervals = self.algorithm.intervals
        sampler = self.algorithm.sampler
        # Evaluated at the rollout's own state, so that both means differ by the policies alone.
        reference = self.context.reference
        ref_mean = reference.mean(trajectory, index, batch.conditioned, intervals, sampler)
        interval = intervals[trajectory.steps[index]]
        # Of the forms only `flow_grpo` looks at it, which is refused where a sampler has none.
        published_std = step.std
        if isinstance(sampler, HasPublishedStd):
            published_std = sampler.published_std(interval)
        gain = sampler.gain(interval)
        return penalty(step, ref_mean, gain=gain, published_std=published_std)

    def diagnose(self, inputs: LossInputs, step_number: int) -> dict[str, Float[Tensor, ""]]:
        """Compute a step's diagnostics, at the loss's own threshold on the KL if it has one.

        `step_number` is the step's place in the grid.
        """
        diagnostics = self.algorithm.diagnostics
        threshold = self.loss.kl_threshold
        if threshold is None:
            return diagnostics(inputs, step_number)
        return diagnostics(inputs, step_number, delta=threshold + inputs.kl_floor)

    def follow(self, num_optimizer_steps: int) -> None:
        """Do nothing: the behaviour policy is the current one anyway."""

    def weights(self) -> dict[str, Mapping[str, Tensor]]:
        return {}

    def load_weights(self, weights: Mapping[str, dict[str, Tensor]]) -> None:
        """Do nothing: there are no weights to take back."""

    def to(self, device: torch.device) -> None:
        """Move the teachers' weights, where there are teachers."""
        if self.context.teachers is not None:
            self.context.teachers.to(device)


def loss_inputs(
    algorithm: Algorithm,
    step: GaussianStep,
    trajectory: Trajectory,
    index: int,
    advantage: Float[Tensor, "B"],
) -> LossInputs:
    """Compare a step with the rollout's, the trajectory's `index`-th step."""
    interval = algorithm.intervals[trajectory.steps[index]]
    old_mean = trajectory.at("old_mean", index)
    likelihood = algorithm.likelihood
    kl = likelihood.kl(step, old_mean)  # with its gradient, which GRPO-Guard's ratio needs
    with torch.no_grad():
        tv_distance = tv(step, old_mean)
        moved = velocity_change(step, old_mean, algorithm.sampler.gain(interval))
    return LossInputs(
        log_ratio=likelihood.log_ratio(step, old_mean, trajectory.at("x_next", index)),
        advantage=advantage,
        kl=kl,
        tv=tv_distance,
        velocity_change=moved,
        std=step.std,
        dt=interval.dt,
        form=likelihood.form,
        reduction=likelihood.reduction,
        dimensions=old_mean[0].numel(),
    )
