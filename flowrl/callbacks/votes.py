"""The callback of a run whose reward is votes: it puts pictures before people, waits for votes, and
fits the reward anew at every iteration.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from flowrl.callbacks.stop import Stop, is_at_end
from flowrl.errors import UserError
from flowrl.parallel.collectives import gather
from flowrl.parallel.strategies import is_later_rank
from flowrl.rewards.images import to_pictures
from flowrl.rewards.routed import Routed
from flowrl.rewards.votes import Votes
from flowrl.training.policy import Policy
from flowrl.training.prompt_data import Iterations, PromptBatch
from flowrl.training.sampling import draw
from flowrl.types import Prompt
from flowrl.values.plural import counted
from flowrl.votes.album import Album, Drawn, remove_old, write_pairs
from flowrl.votes.files import Ballot, open_pairs, read_votes, usable_votes
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
        self.lines_of_wait: int | None = None
        self.routes: list[Routed] = []
        self.album: Album | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score as the last iteration did; a new run has no scores before its first fit."""
        assert isinstance(pl_module, Policy)
        done = pl_module.num_iterations
        self.routes = routes_to(self.scorer, pl_module)
        # The policy moves it only later, and another device's features have other last bits.
        pl_module.reward.to(pl_module.device)

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
            self.album = Album(self.scorer.pairs)
            pl_module.reward.viewer = self._offer

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Policy)
        iteration = pl_module.num_iterations
        pl_module.reward.viewer = None
        if self.album is not None:
            write_pairs(self.scorer.place(), list(self.album.pairs.values()), iteration)
            remove_old(self.scorer.place(), self.scorer.keep)
            self.album = None
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
        require_pictures(policy)
        needed = self._needed(policy.num_iterations)
        num_there = in_first(self._count_all)
        if num_there >= needed:
            return
        num_drawn = 0
        for batch, rows in rows_of_pairs(policy, iterations):
            prompt = batch.prompts[policy.plan.member(rows.start)[0]]
            if not self._is_asked(prompt):
                continue
            first, second = to_pictures(draw_images(policy, batch, rows))
            # Two equal ones would leave nothing to choose.
            if first.tobytes() == second.tobytes():
                continue
            num_drawn += 1
            pair = (prompt.text, first, second)
            # Counted anew, since some may have been drawn before.
            num_there = in_first(partial(self._add, pair, policy.num_iterations))
            if num_there >= needed + self.scorer.pairs:
                break
        if num_there < needed:
            raise UserError(
                f"reward.min_votes={self.scorer.min_votes}: all samples of the run make "
                f"{counted(num_drawn, 'pair')} of pictures to vote on; with earlier ones there are "
                f"{num_there}, and {needed} are needed; lower it"
            )

    def _add(self, pair: Drawn, num_iterations: int) -> int:
        """Write a pair, and return how many there are."""
        write_pairs(self.scorer.place(), [pair], num_iterations)
        return self._count_all()

    def _count_all(self) -> int:
        """Count the votes that can be fitted to, and the pairs that can be voted on."""
        return self._count_with_lines()[0] + len(open_pairs(self.scorer.place()))

    def _is_asked(self, prompt: Prompt) -> bool:
        """Tell whether the votes are asked for the score of a prompt's images."""
        return all(route.is_for(prompt) for route in self.routes)

    def _offer(self, images: Float[Tensor, "B 3 H W"], prompts: Sequence[Prompt]) -> None:
        """Put into the album what it wants of some samples; of images that are no numbers nothing
        can be shown.
        """
        assert self.album is not None
        is_finite = images.flatten(1).isfinite().all(1).tolist()
        rows = [row for row, ok in enumerate(is_finite) if ok and self._is_asked(prompts[row])]
        self.album.offer(
            [prompts[row] for row in rows],
            lambda place: to_pictures(images[rows[place]][None])[0],
        )

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
            count, num_lines = in_first(self._count_with_lines)
            if count >= needed:
                self.lines_of_wait = num_lines
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

    def _count_with_lines(self) -> tuple[int, int]:
        """Count the votes that can be fitted to, and the lines that they are read from."""
        ballot = read_votes(self.scorer.place())
        return len(usable_votes(self.scorer.place(), ballot)), ballot.num_lines

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
            folder = self.scorer.place()
            read = partial(self._read, policy, iteration)
            ballot, is_recorded = votes_of_round(self.run, folder, iteration, read)
            num_votes = len(usable_votes(folder, ballot))
            return self.scorer.fit(ballot), num_votes, ballot.num_damaged, is_recorded

        fitted, num_votes, num_damaged, is_recorded = in_first(fit)
        self.scorer.follow(fitted)
        if num_votes == self.num_votes:
            return
        self.num_votes = num_votes
        agreement = _agreement(fitted)
        again = " (as recorded)" if is_recorded else ""
        damaged = f", {counted(num_damaged, 'damaged line')} left out" if num_damaged else ""
        policy.print(f"iteration {iteration}: {num_votes} votes{again}, {agreement}{damaged}")

    def _read(self, policy: Policy, iteration: int, folder: Path) -> Ballot:
        """Read the votes as they are; or as they were when the wait for them ended, where some were
        taken back since, and too few are left.
        """
        ballot = read_votes(folder)
        num_votes = len(usable_votes(folder, ballot))
        if self.lines_of_wait is None or num_votes >= self._needed(iteration - 1):
            return ballot
        policy.print(
            f"iteration {iteration}: votes were taken back, {num_votes} are left; it is scored by "
            "those that ended the wait"
        )
        return read_votes(folder, self.lines_of_wait)

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


def routes_to(scorer: Votes, policy: Policy) -> list[Routed]:
    """List the rewards that hand the samples of some prompts alone on to the votes."""
    modules = policy.reward.modules()
    return [
        module for module in modules if isinstance(module, Routed) and scorer in module.modules()
    ]


@torch.no_grad()
def require_pictures(policy: Policy) -> None:
    """Raise UserError for a model of clips."""
    latents = torch.zeros(1, *policy.model.latent_shape, device=policy.device)
    if policy.model.decode(latents).ndim != 4:
        raise UserError("reward: people vote on pictures, and the model draws clips")


def draw_images(policy: Policy, batch: PromptBatch, rows: range) -> Tensor:
    """Draw two samples of one prompt as their iteration would under the weights as they are,
    [2, 3, H, W].
    """
    prompt = policy.plan.member(rows.start)[0]
    stochastic = policy.objective.stochastic_steps(batch.iteration, prompt)
    with policy.objective.at_behaviour():
        _, trajectory = draw(policy, batch, rows, stochastic)
        images: Tensor = policy.model.decode(trajectory.x0)
    return images


def _agreement(fit: Fit | None) -> str:
    """Say how far a fit agrees with the votes for one of two pictures."""
    if fit is None:
        return "too few to fit"
    if math.isnan(fit.agreement):
        return "all of them for neither"
    return f"{fit.agreement:.0%} agreed with"


def _clock(seconds: float) -> str:
    """Return the time of day, or the date, in so many seconds."""
    until = datetime.fromtimestamp(time.time() + seconds)
    return f"{until:%H:%M}" if seconds < 86400 else f"{until:%Y-%m-%d %H:%M}"
