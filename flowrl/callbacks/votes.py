"""The callback of a run whose reward is votes: it puts pictures before people, waits for votes, and
fits the reward anew at every iteration.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from flowrl.callbacks.stop import Stop, is_at_end
from flowrl.errors import UserError
from flowrl.parallel.collectives import gather
from flowrl.parallel.strategies import is_later_rank
from flowrl.rewards.images import to_pictures
from flowrl.rewards.votes import Votes
from flowrl.training.policy import Policy
from flowrl.training.prompt_data import Iterations, PromptBatch
from flowrl.training.sampling import draw
from flowrl.values.plural import counted
from flowrl.votes.album import Album, Drawn, remove_old, write_pairs
from flowrl.votes.files import open_pairs, read_votes
from flowrl.votes.fit import Fit
from flowrl.votes.rounds import last_votes, votes_of_round, write_status

PAUSE = 0.5
"""Seconds between two looks at the votes while they are waited for."""

Result = TypeVar("Result")


def votes_in(policy: Policy) -> Votes | None:
    """Return the reward of votes, also inside a mixture; None where there is none.

    Raises UserError where there are several, whose pictures and rounds would be mixed up.
    """
    scorers = [module for module in policy.reward.modules() if isinstance(module, Votes)]
    if len(scorers) > 1:
        raise UserError(f"reward: {len(scorers)} rewards of votes; a run can have one")
    return scorers[0] if scorers else None


class FollowVotes(Callback):
    """The callback that draws the first pairs of pictures before anything is scored, waits until
    there are enough votes, and before each iteration fits `scorer` to those that there are.

    The first process alone reads and writes files; the fit goes to all of them. Which votes an
    iteration had is recorded in the run's `folder`, so that a resumed one has the same. Must stand
    after the rehearsal, before the evaluation, which the first fit scores, and before the
    checkpoint, which a wait that has lasted too long asks `stop` for.
    """

    def __init__(self, *, scorer: Votes, stop: Stop, folder: str) -> None:
        self.scorer = scorer
        self.stop = stop
        self.run = Path(folder)
        self.num_votes = -1

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score as the last iteration did; a new run has no scores before its first fit."""
        assert isinstance(pl_module, Policy)
        done = pl_module.num_iterations

        def refit() -> Fit | None:
            ballot = last_votes(self.run, self.scorer.place(), done)
            return None if ballot is None else self.scorer.fit(ballot)

        self.scorer.follow(in_first(refit) if done else None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Policy)
        iterations = trainer.datamodule.iterations  # type: ignore[attr-defined]
        self._draw_first(pl_module, iterations)
        iteration = pl_module.num_iterations
        is_waiting = self.scorer.until_enough == "wait"
        if is_waiting and not self._wait(pl_module, iteration, len(iterations)):
            if self.stop.is_asked_for():
                trainer.strategy.barrier()
                raise SIGTERMException
            raise UserError(
                f"fewer than {self._needed(iteration)} votes within reward.wait_seconds="
                f"{self.scorer.wait_seconds:g}; vote with: flowrl vote {self.run}, and continue "
                f"with: python train.py resume={self.run}"
            )
        self._fit(pl_module, iteration + 1)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: PromptBatch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Policy)
        self._fit(pl_module, batch.iteration + 1)
        if not is_later_rank():
            iterations = trainer.datamodule.iterations  # type: ignore[attr-defined]
            self._tell_page(batch.iteration, len(iterations), None)
            self.scorer.album = Album(self.scorer.pairs)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Policy)
        iteration = pl_module.num_iterations
        album = self.scorer.album
        self.scorer.album = None
        if album is not None:
            write_pairs(self.scorer.place(), list(album.pairs.values()), iteration)
            remove_old(self.scorer.place(), self.scorer.keep)
        must_wait = self.scorer.until_enough == "wait" and not is_at_end(trainer, pl_module)
        iterations = trainer.datamodule.iterations  # type: ignore[attr-defined]
        if must_wait and not self._wait(pl_module, iteration, len(iterations)):
            # The checkpoint's callback, which comes after this one, saves and ends the run.
            self.stop.has_signal = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tell_end()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._tell_end()

    def _draw_first(self, policy: Policy, iterations: Iterations) -> None:
        """Draw pairs under the weights as they are, until there are as many as must be voted on
        next and some more. All processes draw the same ones.

        Raises UserError where the run's samples make too few, and for a model of clips.
        """
        scorer = self.scorer
        needed = self._needed(policy.num_iterations)
        folder = scorer.place()
        known = in_first(lambda: len(read_votes(folder).votes) + len(open_pairs(folder)))
        if known >= needed:
            return
        drawn: list[Drawn] = []
        for batch, rows in rows_of_pairs(policy, iterations):
            if len(drawn) == needed - known + scorer.pairs:
                break
            prompt = batch.prompts[policy.plan.member(rows.start)[0]]
            first, second = to_pictures(draw_images(policy, batch, rows))
            # Two equal ones would leave nothing to choose.
            if first.tobytes() != second.tobytes():
                drawn.append((prompt.text, first, second))
        if len(drawn) < needed - known:
            raise UserError(
                f"reward.min_votes={scorer.min_votes}: all samples of the run make "
                f"{counted(len(drawn), 'pair')} of pictures to vote on, {needed - known} are "
                "needed; lower it"
            )
        if not is_later_rank():
            write_pairs(folder, drawn, policy.num_iterations)

    def _needed(self, num_iterations: int) -> int:
        """Return how many votes there must be after so many iterations for the next one."""
        return self.scorer.min_votes + num_iterations * self.scorer.votes_per_iteration

    def _wait(self, policy: Policy, num_iterations: int, num_all: int) -> bool:
        """Wait until there are enough votes for the next iteration; False where the run is to stop
        or `wait_seconds` are over. All processes call it.
        """
        needed = self._needed(num_iterations)
        limit = self.scorer.wait_seconds
        began = time.monotonic()
        told = -1
        while True:
            # Asked in short turns, so that no collective waits as long as people do.
            count = in_first(lambda: len(read_votes(self.scorer.place()).votes))
            if count >= needed:
                return True
            is_over = in_first(lambda: limit is not None and time.monotonic() - began > limit)
            if self.stop.is_asked_for() or is_over:
                if is_over:
                    policy.print(f"{count} of {needed} votes after {limit:g} s: stopping")
                return False
            if told < 0:
                policy.print(self._call_to_vote(count, needed))
            if count != told and not is_later_rank():
                self._tell_page(num_iterations, num_all, needed)
            told = count
            time.sleep(PAUSE)

    def _call_to_vote(self, count: int, needed: int) -> str:
        """Say what is waited for, how long, and how to vote."""
        limit = self.scorer.wait_seconds
        until = "" if limit is None else f", until {_clock(limit)}"
        return f"waiting for votes ({count} of {needed}{until}); vote with: flowrl vote {self.run}"

    def _fit(self, policy: Policy, iteration: int) -> None:
        """Fit scores to the votes of an iteration, and say so where there are others than before.
        All processes call it.
        """

        def fit() -> tuple[Fit | None, int, int, bool]:
            ballot, is_recorded = votes_of_round(self.run, self.scorer.place(), iteration)
            fit = self.scorer.fit(ballot)
            return fit, len(ballot.votes), ballot.num_damaged, is_recorded

        fitted, num_votes, num_damaged, is_recorded = in_first(fit)
        self.scorer.follow(fitted)
        if num_votes == self.num_votes:
            return
        self.num_votes = num_votes
        agreement = "too few to fit" if fitted is None else f"{fitted.agreement:.0%} agreed with"
        again = " (as recorded)" if is_recorded else ""
        damaged = f", {counted(num_damaged, 'damaged line')} left out" if num_damaged else ""
        policy.print(f"iteration {iteration}: {num_votes} votes{again}, {agreement}{damaged}")

    def _tell_page(self, num_iterations: int, num_all: int, needed: int | None) -> None:
        status = {
            "iterations": num_iterations,
            "all_iterations": num_all,
            "used": max(self.num_votes, 0),
            "needed": needed,
            "is_over": False,
        }
        write_status(self.scorer.place(), status)

    def _tell_end(self) -> None:
        if not is_later_rank():
            write_status(self.scorer.place(), {"is_over": True})


def in_first(work: Callable[[], Result]) -> Result:
    """Do `work` in the first process and return its result in all of them.

    Raises UserError in all of them where it does, so that none waits for one that has ended.
    """
    result: Result | None = None
    problem: str | None = None
    if not is_later_rank():
        try:
            result = work()
        except UserError as error:
            problem = str(error)
    # Only what the first process found counts.
    found, trouble = gather((result, problem))[0]
    if trouble is not None:
        raise UserError(trouble)
    return found  # type: ignore[return-value]


def rows_of_pairs(policy: Policy, iterations: Iterations) -> Iterator[tuple[PromptBatch, range]]:
    """Yield two samples after two others of the run's remaining ones, of as many prompts as
    possible first: each iteration's, and of its groups the first two samples, the next two, ...
    """
    size = policy.plan.group_size
    for number in range(policy.num_iterations, len(iterations)):
        batch = iterations[number]
        for place in range(0, size - 1, 2):
            for prompt in range(len(batch.prompts)):
                start = prompt * size + place
                yield batch, range(start, start + 2)


def draw_images(policy: Policy, batch: PromptBatch, rows: range) -> Tensor:
    """Draw two samples of one prompt as their iteration would under the weights as they are,
    [2, 3, H, W].

    Raises UserError for clips.
    """
    prompt = policy.plan.member(rows.start)[0]
    stochastic = policy.objective.stochastic_steps(batch.iteration, prompt)
    with policy.objective.at_behaviour():
        _, trajectory = draw(policy, batch, rows, stochastic)
        images: Tensor = policy.model.decode(trajectory.x0)
    if images.ndim != 4:
        raise UserError("reward: people vote on pictures, and the model draws clips")
    return images


def _clock(seconds: float) -> str:
    """Return the time of day, or the date, in so many seconds."""
    until = datetime.fromtimestamp(time.time() + seconds)
    return f"{until:%H:%M}" if seconds < 86400 else f"{until:%Y-%m-%d %H:%M}"
