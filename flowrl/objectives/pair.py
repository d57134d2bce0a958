"""The difference between the two samples of a pair, and how far the velocity has gone along it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flowrl.gaussian import broadcast, mean_square
from flowrl.noise import on_device
from flowrl.objectives.protocol import Member
from flowrl.types import LossInputs

MIN_SQUARE = 1e-6
"""What is added to the mean square that a difference is divided by, as in the authors' code."""


def paired(
    inputs: LossInputs,
    *,
    moved: Float[Tensor, "B *X"],
    x0: Float[Tensor, "B *X"],
    is_used: Bool[Tensor, "B"],
    members: Sequence[Member],
) -> LossInputs:
    """Add the `pair_log_ratio` of samples that became `x0` and whose velocity has `moved` by v -
    v_old at this step, and make of their advantages half the differences to their partners'.

    The ratio's logarithm is mean d^2 - mean (v - v_old + d)^2 over latent dimensions, 0 where v =
    v_old. d = (x0 - partner's x0) / 2, over its mean square: from the partner to the sample itself.
    Since v = noise - data, a velocity that falls by d takes the sample further from its partner,
    which is the way that its own reward, if it is the higher one, asks for. A sample that is not
    used, or whose partner is not, has an advantage of 0. `members` are the prompts and numbers of
    the samples, which are in whole pairs.

    Source: FDFO (McAllister et al. 2026, arXiv 2603.12893).
    """
    partners = on_device(torch.tensor(partners_of(members)), x0.device)

    def of_partner(values: Tensor) -> Tensor:
        return values.index_select(0, partners)

    half = (x0 - of_partner(x0)) / 2
    toward_own = half / broadcast(mean_square(half) + MIN_SQUARE, half)
    # The square written out, so that equal velocities give exactly 0.
    log_ratio = -mean_square(moved) - 2 * (moved * toward_own).flatten(1).mean(1)
    difference = (inputs.advantage - of_partner(inputs.advantage)) / 2
    both_used = is_used & of_partner(is_used)
    advantage = torch.where(both_used, difference, 0.0)
    return replace(inputs, advantage=advantage, pair_log_ratio=log_ratio)


def partners_of(members: Sequence[Member]) -> list[int]:
    """Return the place of each sample's partner among samples in whole pairs: of a prompt the first
    two, the next two, and so on.
    """
    places = {member: place for place, member in enumerate(members)}
    # A sample's number is even or odd: its partner's is the next or the one before.
    return [places[prompt, sample + 1 - 2 * (sample % 2)] for prompt, sample in members]
