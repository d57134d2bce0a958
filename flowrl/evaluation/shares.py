"""Shares of a prompt set: each process draws and scores some rows, and all are joined again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flowrl.rewards.outputs import concatenate, reorder
from flowrl.types import RewardOutput


@dataclass(frozen=True, slots=True)
class Share:
    """Scores and statistics of some rows of a set, without their images.

    Entry i of everything belongs to row `rows[i]`. `looks` are the statistics of
    `flowrl.images.motion.looks_of` by name, and `spread` is as the function gives it.
    """

    rows: list[int]
    scores: RewardOutput
    looks: Mapping[str, Float[Tensor, "B"]]
    spread: Float[Tensor, "B"]


def spread(
    images: Sequence[Float[Tensor, "*F 3 H W"]], images_per_prompt: int
) -> Float[Tensor, "B"]:
    """Return for each image the mean square distance, per pixel, of its prompt's images; NaN where
    a prompt has a single one.

    The images of a prompt follow each other.
    """
    if images_per_prompt == 1:
        return torch.full((len(images),), math.nan)
    spreads = []
    for start in range(0, len(images), images_per_prompt):
        group = torch.stack(list(images[start : start + images_per_prompt]))
        # The mean over pairs of |a - b|^2 is twice the unbiased variance within the group.
        spreads.append(2 * group.var(0, correction=1).mean())
    return torch.stack(spreads).repeat_interleave(images_per_prompt)


class Spreads:
    """The spread of images that come in batches, prompt by prompt, of which only those of a prompt
    that is not whole yet are held.
    """

    def __init__(self, images_per_prompt: int) -> None:
        self.images_per_prompt = images_per_prompt
        self.waiting: list[Tensor] = []
        self.known: list[Tensor] = []

    def add(self, images: Float[Tensor, "B *F 3 H W"]) -> None:
        """Take the next images."""
        self.waiting += images
        num_whole = len(self.waiting) // self.images_per_prompt * self.images_per_prompt
        if num_whole:
            self.known.append(spread(self.waiting[:num_whole], self.images_per_prompt))
            del self.waiting[:num_whole]

    def so_far(self) -> Float[Tensor, "B"]:
        """Return the spread of every image of prompts that are whole, in order."""
        return torch.cat(self.known)


def merge(shares: Sequence[Share]) -> Share:
    """Join what all processes have, in the order of the rows."""
    rows = [row for share in shares for row in share.rows]
    order = torch.tensor(rows).argsort()
    looks = {}
    for stat in shares[0].looks:
        looks[stat] = torch.cat([share.looks[stat] for share in shares])[order]
    spreads = torch.cat([share.spread for share in shares])
    scores = concatenate([share.scores for share in shares])
    return Share(sorted(rows), reorder(scores, order), looks, spreads[order])
