"""The parts that losses on preferences share: how much better than an anchor a sample is fitted,
and which samples of a prompt are preferred to which.
"""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flowrl.gaussian import latent_axes
from flowrl.losses.protocol import ForwardLoss
from flowrl.losses.regression import flow_target
from flowrl.types import ForwardInputs
from flowrl.values.bounds import Positive


@dataclass(kw_only=True)
class PreferenceLoss(ForwardLoss, ABC):
    """A loss on which samples of a prompt are preferred, by their flow-matching errors beside those
    of an anchor.

    The anchor is the frozen reference, or with `anchor=old` the policy that drew the samples, which
    follows the current one as `decay_*` say. `beta` is what DPO multiplies implicit rewards by.
    """

    compares: ClassVar[bool] = True

    beta: Positive
    anchor: Literal["reference", "old"]

    @property
    def needs_old(self) -> bool:
        return self.anchor == "old"

    @property
    def needs_reference(self) -> bool:
        return self.anchor == "reference"

    def anchor_velocity(self, inputs: ForwardInputs) -> Float[Tensor, "B *X"]:
        """Return the velocity of the anchor."""
        if self.anchor == "old":
            return inputs.old_velocity
        assert inputs.ref_velocity is not None
        return inputs.ref_velocity


def error_change(inputs: ForwardInputs, *, anchor: Float[Tensor, "B *X"]) -> Float[Tensor, "B"]:
    """Compute mean ((u - v)^2 - (u - anchor_v)^2) over latent dimensions, with u = eps - x0: below
    0 where the current policy fits a sample better than the anchor, whose velocity `anchor` is.

    It is computed as (v - anchor_v) ((v - u) + (anchor_v - u)), which is exactly 0 where the
    velocities are equal and rounds relative to their difference.
    """
    target = flow_target(inputs)
    moved = inputs.velocity - anchor
    product = moved * ((inputs.velocity - target) + (anchor - target))
    return product.mean(latent_axes(product))


def same_group(inputs: ForwardInputs) -> Bool[Tensor, "B B"]:
    """Tell which samples are used and of one prompt, each with itself, too."""
    assert inputs.group is not None
    return _same(inputs.group, is_used=inputs.is_used)


def pairs(
    advantage: Float[Tensor, "B"],
    *,
    group: Int[Tensor, "B"],
    is_used: Bool[Tensor, "B"],
    num_pairs: int,
) -> Bool[Tensor, "B B"]:
    """Tell which sample (a row) is preferred to which (a column).

    The i-th best of a group is paired with its i-th worst, for the first `num_pairs` of them and at
    most half the group; among equal advantages the earlier sample counts as the better. Two samples
    of equal advantage are no pair, and a sample that is not used belongs to none.
    """
    same = _same(group, is_used=is_used)
    # The place of each sample in its group, from the best, and from the worst.
    place = torch.arange(len(advantage), device=advantage.device)
    is_higher = advantage[:, None] > advantage
    is_equal = advantage[:, None] == advantage
    is_ahead = same & (is_higher | (is_equal & (place[:, None] < place)))
    from_best = is_ahead.sum(0)
    from_worst = is_ahead.sum(1)
    is_chosen = from_best < num_pairs
    # A sample of the worse half is not higher than the one that is as far from the other end.
    return same & is_higher & is_chosen[:, None] & (from_best[:, None] == from_worst)


def _same(group: Int[Tensor, "B"], *, is_used: Bool[Tensor, "B"]) -> Bool[Tensor, "B B"]:
    """Tell which samples are used and of one group."""
    return (group[:, None] == group) & is_used[:, None] & is_used
