"""DGPO: the preference of a whole group's better samples to its worse ones, in one sigmoid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from flowrl.gaussian import mean_square
from flowrl.losses.preference import PreferenceLoss, error_change, same_group
from flowrl.losses.ratio import masked_shares
from flowrl.losses.regression import flow_target
from flowrl.losses.used import keep_used
from flowrl.types import ForwardInputs, LossOutput
from flowrl.values.bounds import ClipHigh, ClipLow, Limit


@dataclass(kw_only=True)
class DGPO(PreferenceLoss):
    """Mean over samples of w A d, with w = sigmoid(beta / G sum over the group of A change) without
    gradient.

    d = mean (u - v)^2 over latent dimensions and change = d - anchor_d, where u = eps - x0 and the
    samples of a group are noised to one sigma with one noise; G is the group's size, and A is
    clipped to +-advantage_clip. A sample is clipped, and gives no gradient, where r = exp(old_d -
    d) has left [1 - clip_low, 1 + clip_high] on the side that A moves it to; with clip_low 1 and
    clip_high infinite none is. A sample that is not used has an advantage of 0.

    Paper: Direct Group Preference Optimization (Luo et al. 2025, arXiv 2510.08425) and its code,
    where `anchor=old` is `use_ema_ref`. Its penalty is `penalty=velocity`; that it trains on high
    noise alone (its timestep clip) is left out.
    """

    name: ClassVar[str] = "dgpo"

    clip_low: ClipLow
    clip_high: ClipHigh
    advantage_clip: Limit

    @property
    def needs_old(self) -> bool:
        return True

    def __call__(self, inputs: ForwardInputs) -> LossOutput:
        used = keep_used(inputs)
        assert used.group_size is not None
        advantage = used.advantage.clamp(-self.advantage_clip, self.advantage_clip)
        error = mean_square(used.velocity - flow_target(used))
        with torch.no_grad():
            change = error_change(used, anchor=self.anchor_velocity(used))
            scores = advantage * self.beta * change / used.group_size
            margin = -torch.where(same_group(used), scores, 0.0).sum(1)
            weight = torch.sigmoid(-margin)
            ratio = torch.exp(-error_change(used, anchor=used.old_velocity))
            high = (advantage > 0) & (ratio > 1 + self.clip_high)
            low = (advantage < 0) & (ratio < 1 - self.clip_low)
            metrics = masked_shares(positive=high, negative=low) | {
                "preference/margin": margin.mean(),
                "preference/accuracy": (margin > 0).to(margin).mean(),
            }
        kept = torch.where(high | low, error.detach(), error)
        return LossOutput((weight * advantage * kept).mean(), metrics)
