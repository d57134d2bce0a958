"""Votes of people as a reward: a score that is fitted to them, and the pictures to vote on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from flowrl.errors import UserError
from flowrl.images.pictures import to_rgb
from flowrl.rewards.looks import Features
from flowrl.rewards.outputs import all_valid
from flowrl.rewards.protocol import Images
from flowrl.types import Prompt, RewardOutput
from flowrl.values.bounds import Count, Duration, Natural, Positive, Text
from flowrl.values.check import checked
from flowrl.votes.files import VOTES, Ballot, Vote, picture_path, read_votes, usable_votes
from flowrl.votes.fit import Fit, fit_scores

log = logging.getLogger(__name__)

PREFERENCE = {"left": 1.0, "right": 0.0, "equal": 0.5}


class Votes(nn.Module):
    """The score that explains the votes in `folder`, in log-odds: `flowrl.votes.fit` on `features`.

    0 is the mean of the pictures of the first `min_votes` votes; with fewer votes there is no
    score. Part: win_rate, the probability that people prefer an image to one of score 0.

    In training `flowrl.callbacks.votes` says when scores are fitted anew, by `follow`, and waits
    for votes as `until_enough`, `votes_per_iteration` and `wait_seconds` say; of every iteration
    two pictures of `pairs` prompts are put before people, and of those that nobody voted on the
    newest `keep` pairs stay. Elsewhere, as in scripts/evaluate.py, the first `lines` lines of the
    votes count, None for all of them. `folder` None stands for the run's own.
    """

    only_computes = True
    part_names = ("win_rate",)

    @checked("reward")
    def __init__(
        self,
        *,
        folder: Text | None,
        lines: Natural | None,
        features: Features,
        prior_std: Positive,
        min_votes: Count,
        until_enough: Literal["wait", "abstain"],
        votes_per_iteration: Natural,
        wait_seconds: Duration | None,
        pairs: Count,
        keep: Count,
    ) -> None:
        super().__init__()
        self.folder = None if folder is None else Path(folder).expanduser()
        self.lines = lines
        self.features = features
        self.prior_std = prior_std
        self.min_votes = min_votes
        self.until_enough = until_enough
        self.votes_per_iteration = votes_per_iteration
        self.wait_seconds = wait_seconds
        self.pairs = pairs
        self.keep = keep
        self.in_force: Fit | None = None
        self.is_followed = False
        self.known: dict[tuple[str, str], Tensor] = {}

    def forward(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        fit = self.in_force if self.is_followed else self._fit_to_all()
        if fit is None:
            return _abstain(len(prompts))
        scores = fit.scores(self.features(images, prompts))
        return all_valid(scores, {"win_rate": scores.sigmoid()})

    def follow(self, fit: Fit | None) -> None:
        """Score by this fit from here on; with None there are no scores."""
        self.in_force = fit
        self.is_followed = True

    def place(self) -> Path:
        """Return the folder of votes. Raises UserError where none is known."""
        if self.folder is None:
            raise UserError(
                "reward.folder=null: only a run has votes of its own; give the folder `votes` of "
                "one"
            )
        return self.folder

    def fit(self, ballot: Ballot) -> Fit | None:
        """Fit scores to votes, those without their pictures left out; None where there are fewer
        than `min_votes`.
        """
        folder = self.place()
        votes = usable_votes(folder, ballot)
        if len(votes) < len(ballot.votes):
            lost = len(ballot.votes) - len(votes)
            log.warning("%s: the pictures of %d votes are gone; they do not count", folder, lost)
        if len(votes) < self.min_votes:
            return None
        return fit_scores(
            self._features_of(votes, [vote.left for vote in votes]),
            self._features_of(votes, [vote.right for vote in votes]),
            torch.tensor([PREFERENCE[vote.choice] for vote in votes]),
            prior_std=self.prior_std,
            num_first=self.min_votes,
        )

    def _fit_to_all(self) -> Fit:
        """Fit scores once, and keep them. Raises UserError where there are too few votes."""
        if self.in_force is None:
            folder = self.place()
            ballot = read_votes(folder, self.lines)
            self.in_force = self.fit(ballot)
            if self.in_force is None:
                raise UserError(
                    f"{folder / VOTES}: {len(usable_votes(folder, ballot))} votes, fewer than "
                    f"reward.min_votes={self.min_votes}; vote on more, or lower it"
                )
        return self.in_force

    @torch.no_grad()
    def _features_of(self, votes: Sequence[Vote], digests: Sequence[str]) -> Float[Tensor, "N D"]:
        """Return the features of the pictures with these digests, one a vote; each is read once.

        A network's features depend on how many pictures it is given, in their last bits. A resumed
        run has other ones to take at once, so each picture is taken alone.
        """
        keys = [(digest, vote.prompt) for vote, digest in zip(votes, digests, strict=True)]
        for digest, text in keys:
            if (digest, text) not in self.known:
                picture = _read(picture_path(self.place(), digest))
                [features] = self.features([picture], [Prompt(text)]).cpu()
                self.known[digest, text] = features
        return torch.stack([self.known[key] for key in keys])


def _read(path: Path) -> Image.Image:
    """Read a picture. Raises UserError for a file that is none."""
    try:
        with Image.open(path) as picture:
            return to_rgb(picture)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); restore it, or remove it") from error


def _abstain(count: int) -> RewardOutput:
    """Make the output of a reward that has nothing to say of any image."""
    values = torch.zeros(count)
    applies = torch.zeros(count, 1, dtype=torch.bool)
    parts = {"win_rate": torch.full((count,), torch.nan)}
    return RewardOutput(values, torch.ones(count, dtype=torch.bool), parts, applies=applies)
