"""Scouting: many candidates of each prompt are drawn cheaply and scored, and only those that are
kept are drawn in full, from the very same noise, and trained on (Sol-RL, arXiv 2604.06916).

Noise is a function of seed, iteration, prompt, sample and step, so a sample that is kept is drawn
again by its number alone. A candidate that takes as many steps as a rollout is the rollout itself,
without the states that updates replay, and its image comes again bitwise where as many rows pass
through the network together: in a micro-batch of the same size, with as many starts where samples
share theirs. One that takes fewer is drawn from the same initial noise without any in its steps.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flowrl.advantages import weighted_sum
from flowrl.algorithm import Algorithm
from flowrl.errors import UserError
from flowrl.objectives.protocol import Member
from flowrl.parallel.sharding import is_divided
from flowrl.schedule import intervals
from flowrl.training.batch_plan import BatchPlan
from flowrl.training.best_worst import Choice, Kept
from flowrl.training.memory import memory_for, smaller_micro_batch
from flowrl.training.metric_means import Clock, Record
from flowrl.training.prompt_data import PromptBatch
from flowrl.training.sampling import Piece, draw_members, require_equal_counts, split_by_steps
from flowrl.training.scoring import gather_rows
from flowrl.values.plural import counted

if TYPE_CHECKING:
    from flowrl.training.policy import Policy

SCOUTED = "perf/scouting_seconds"
"""The lap that scouting ends."""

log = logging.getLogger(__name__)


def check_scouting(choice: Choice | None, plan: BatchPlan, algorithm: Algorithm) -> None:
    """Raise UserError where candidates do not suit the batch or the method's rollouts."""
    if choice is None:
        return
    num_steps, full = choice.num_steps, algorithm.num_steps
    if not algorithm.loss.needs_advantages:
        raise UserError(
            f"scouting keeps the best and the worst samples of a prompt to be compared, but "
            f"loss={algorithm.loss.name} compares none: set scouting=none"
        )
    if choice.candidates <= plan.group_size:
        raise UserError(
            f"scouting.candidates={choice.candidates} must be more than batch.group_size="
            f"{plan.group_size}, the samples of a prompt that are kept; raise it, or set "
            "scouting=none"
        )
    if num_steps > full:
        raise UserError(
            f"scouting.num_steps={num_steps} must be at most rollout.num_steps={full}, the steps "
            "of what is trained on"
        )
    if num_steps < full and algorithm.shared_initial_noise:
        raise UserError(
            f"scouting.num_steps={num_steps}, below rollout.num_steps={full}, draws candidates "
            "without noise in their steps, which rollout.shared_initial_noise=true makes equal: "
            f"set it to false, or scouting.num_steps={full}"
        )
    if plan.prompts_per_iteration * choice.candidates % plan.num_processes:
        raise UserError(
            f"batch.prompts_per_iteration={plan.prompts_per_iteration} x scouting.candidates="
            f"{choice.candidates} do not split into {plan.num_processes} processes; make them a "
            f"multiple of {plan.num_processes}"
        )


def plan_of_candidates(choice: Choice, plan: BatchPlan) -> BatchPlan:
    """Return the plan by which candidates are split over processes and micro-batches.

    Micro-batches are those of the trained samples where their size divides a process's candidates,
    so that one that is drawn again meets the same batch shape; else smaller ones.
    """
    return BatchPlan(
        prompts_per_iteration=plan.prompts_per_iteration,
        group_size=choice.candidates,
        updates_per_iteration=1,
        inner_epochs=1,
        max_micro_batch=plan.micro_batch,
        num_processes=plan.num_processes,
    )


class Scouting:
    """The candidates of an iteration, and which of them its rows are; without a `choice` every
    sample that is drawn is trained on, and nothing is scouted.

    Of each prompt of the running iteration `kept` says which candidates are trained on, `numbers`
    has these in rising order, and `scores` what all of them scored.
    """

    def __init__(self, choice: Choice | None, plan: BatchPlan) -> None:
        self.choice = choice
        self.plan = plan
        self.candidates = None if choice is None else plan_of_candidates(choice, plan)
        self.kept: list[Kept] = []
        self.numbers: list[list[int]] = []
        self.scores: list[list[float | None]] = []

    @property
    def num_drawn(self) -> int:
        """The number of images that an iteration draws and scores, over all processes."""
        num_candidates = 0 if self.candidates is None else self.candidates.num_samples
        return self.plan.num_samples + num_candidates

    def describe(self) -> list[str]:
        """Return the plan in lines, as it is printed before training; none without scouting."""
        if self.choice is None or self.candidates is None:
            return []
        plan = self.candidates
        num_micro_batches = len(plan.updates(0)[0])
        return [
            f"  {'scouting':<25} {plan.prompts_per_iteration} prompts x "
            f"{plan.group_size} candidates = {plan.num_samples}, in "
            f"{counted(self.choice.num_steps, 'step')}, {self.plan.group_size} of each prompt kept",
            f"  {'':<25} {plan.num_processes} x {num_micro_batches} of {plan.micro_batch} "
            "candidates",
        ]

    def member(self, row: int) -> Member:
        """Return the prompt of a global sample number, and the sample's number among those of the
        prompt: of its candidates, once the iteration's are chosen, or its place in the group.
        """
        prompt, place = self.plan.member(row)
        return prompt, self.numbers[prompt][place] if self.numbers else place

    def scout(self, policy: Policy, batch: PromptBatch, record: Record, clock: Clock) -> None:
        """Draw and score an iteration's candidates, choose those that are trained on, and end a lap
        of the clock.

        All processes must call it, under the weights that draw the rollouts, and come to the same
        choice. Raises TooManyMissingRewards as RewardModule.check does, OutOfMemory, and UserError
        for a choice that keeps another number of candidates than a group has.
        """
        if self.choice is None or self.candidates is None:
            return
        with memory_for("scouting", smaller_micro_batch(self.plan)):
            values = self._score(policy, batch)
        by_prompt = values.view(-1, self.choice.candidates).tolist()
        self.scores = [[None if score != score else score for score in row] for row in by_prompt]
        size = self.plan.group_size
        self.kept = [self.choice.choose(scores, size) for scores in self.scores]
        for kept in self.kept:
            _check_kept(kept, size, self.choice.candidates)
        self.numbers = [kept.numbers for kept in self.kept]
        self._warn_of_unscored(policy)
        _record_scores(record, values, self.scores)
        clock.lap(SCOUTED)

    def pieces(self, policy: Policy, iteration: int, rank: int) -> list[Piece]:
        """Return the rows of a process's candidates that pass through the network together, with
        the steps in which they draw noise: the rollouts' own, or none where they take fewer. There
        are none without scouting.
        """
        if self.choice is None or self.candidates is None:
            return []
        [micro_batches] = self.candidates.updates(rank)
        if self.choice.num_steps < policy.algorithm.num_steps:
            return [(rows, ()) for rows in micro_batches]
        return split_by_steps(policy, iteration, micro_batches, self.candidates)

    def members(self, rows: range) -> list[Member]:
        """Return the candidates with these numbers."""
        assert self.candidates is not None
        return [self.candidates.member(row) for row in rows]

    @torch.no_grad()
    def draw(self, policy: Policy, batch: PromptBatch, piece: Piece) -> Float[Tensor, "B *F 3 H W"]:
        """Draw the images of a piece of the candidates, whose states are not kept."""
        assert self.choice is not None and self.candidates is not None
        rows, stochastic = piece
        grid = intervals(policy.algorithm.schedule, self.choice.num_steps)
        _, trajectory = draw_members(policy, batch, self.members(rows), stochastic, (), grid)
        return policy.model.decode(trajectory.x0)

    def _score(self, policy: Policy, batch: PromptBatch) -> Float[Tensor, "N"]:
        """Return the scores of all processes' candidates, in the order of their numbers; NaN where
        one is missing, or no reward applies.
        """
        assert self.candidates is not None
        plan = self.candidates
        pieces = self.pieces(policy, batch.iteration, policy.global_rank)
        if is_divided(policy.transformer):
            ranks = range(plan.num_processes)
            require_equal_counts(len(self.pieces(policy, batch.iteration, r)) for r in ranks)
        scores = []
        for rows, stochastic in pieces:
            images = self.draw(policy, batch, (rows, stochastic))
            prompts = [batch.prompts[prompt] for prompt, _ in self.members(rows)]
            size = plan.group_size
            scores.append(policy.reward.submit(images, prompts, first=rows.start, group_size=size))
        output = policy.reward.collect(scores)
        assert output.terms is not None
        # Processes come one after the other, as the candidates of a plan with one update do.
        terms = gather_rows(policy, output.terms)
        is_valid = gather_rows(policy, output.is_valid)
        policy.reward.check(is_valid, terms, output.info)
        values = weighted_sum(terms, torch.tensor(output.weights))
        return values.where(is_valid, torch.nan)

    def compare(
        self,
        rows: Int[Tensor, "B"],
        rewards: Float[Tensor, "B"],
        is_valid: Bool[Tensor, "B"],
        record: Record,
    ) -> None:
        """Record how well scores told the rewards that the same samples have when drawn in full.

        `rows`, their rewards and whether they have one are those of all processes.
        """
        if not self.kept:
            return
        of_member = {}
        for row, reward, ok in zip(rows.tolist(), rewards.tolist(), is_valid.tolist(), strict=True):
            of_member[self.member(row)] = reward if ok else torch.nan
        agreements = []
        for prompt, kept in enumerate(self.kept):
            rewards_of = {number: of_member[prompt, number] for number in kept.numbers}
            agreements += _agreements(kept, self.scores[prompt], rewards_of)
        if agreements:
            record.add("scouting/agreement", sum(agreements) / len(agreements))

    def _warn_of_unscored(self, policy: Policy) -> None:
        """Say in a line, in the first process, where candidates without a score are trained on."""
        count = sum(1 for kept in self.kept if kept.unscored)
        if count and policy.global_rank == 0:
            log.warning(
                "scouting: %s of %d had fewer candidates with a score than are kept, and keep "
                "others, by number",
                counted(count, "prompt"),
                len(self.kept),
            )


def _check_kept(kept: Kept, size: int, num_candidates: int) -> None:
    """Raise UserError unless a choice keeps as many different candidates as a group has samples."""
    numbers = kept.numbers
    is_whole = len(set(numbers)) == len(numbers) == size
    if not is_whole or not set(numbers) <= set(range(num_candidates)):
        raise UserError(
            f"scouting: {numbers} were kept; a choice must keep {size} different candidates of a "
            f"prompt, numbered from 0 to {num_candidates - 1}"
        )


def _agreements(
    kept: Kept, scores: Sequence[float | None], rewards: dict[int, float]
) -> list[float]:
    """Compare each of the best with each of the worst that has a lower score: 1 where its reward is
    higher too, 0 where it is lower, a half where the two are equal.
    """
    results = []
    for best in kept.best:
        for worst in kept.worst:
            score, lower_score = scores[best], scores[worst]
            assert score is not None and lower_score is not None
            gap = rewards[best] - rewards[worst]
            if score > lower_score and gap == gap:
                results.append(0.5 if gap == 0 else float(gap > 0))
    return results


def _record_scores(
    record: Record, values: Float[Tensor, "N"], scores: Sequence[Sequence[float | None]]
) -> None:
    """Add the metrics of an iteration's candidates, which are those of all processes."""
    has_score = values.isfinite()
    if has_score.any():
        record.add("scouting/reward_mean", values[has_score].mean())
        record.add("scouting/reward_std", values[has_score].std(correction=0))
    record.add("scouting/missing", 1 - has_score.float().mean())
    num_constant = sum(1 for of_prompt in scores if len(set(of_prompt) - {None}) < 2)
    record.add("scouting/constant_groups", num_constant / len(scores))
