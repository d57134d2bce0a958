"""The reward module: holds the frozen scorer, moves it, and turns failures into missing rewards."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from jaxtyping import Float
from lightning import LightningModule
from torch import Tensor, nn

from flowrl.rewards.protocol import Reward
from flowrl.types import Prompt, RewardOutput

log = logging.getLogger(__name__)


class TooManyMissingRewards(RuntimeError):
    """More rewards failed than `reward.max_missing` allows."""


class RewardModule(LightningModule):
    """Scores images without gradients. A call that raises, or gives NaN or the wrong length, marks samples missing.

    `check` raises TooManyMissingRewards where more than `max_missing` (a share) of an iteration's samples failed.
    """

    def __init__(self, *, reward: Reward, max_missing: float) -> None:
        super().__init__()
        if not 0 <= max_missing <= 1:
            raise ValueError(f"reward.max_missing={max_missing} must be in [0, 1]")
        self.reward = reward
        self.max_missing = max_missing
        if isinstance(reward, nn.Module):
            reward.requires_grad_(False).eval()

    @torch.no_grad()
    def score(self, images: Float[Tensor, "B 3 S S"], prompts: Sequence[Prompt]) -> RewardOutput:
        try:
            output = self.reward(images, prompts)
            for name, values in {"values": output.values, "is_valid": output.is_valid, **output.parts}.items():
                if values.shape != (len(prompts),):
                    raise ValueError(f"{len(prompts)} images, but {name} of shape {tuple(values.shape)}")
        except Exception:  # any failure of a scorer, whoever wrote it, is a missing reward
            log.exception("reward failed on %d images: all are marked missing", len(prompts))
            weights = getattr(self.reward, "weights", (1.0,))
            none = torch.zeros(len(prompts), len(weights))
            return RewardOutput(none[:, 0], none[:, 0].bool(), terms=none, weights=weights)
        values = output.values.float().cpu()
        is_valid = output.is_valid.cpu() & values.isfinite()
        parts = {name: part.float().cpu() for name, part in output.parts.items()}
        terms = (values[:, None] if output.terms is None else output.terms).float().cpu()
        is_valid &= terms.isfinite().all(1)
        values, terms = torch.where(is_valid, values, 0.0), torch.where(is_valid[:, None], terms, 0.0)
        return RewardOutput(values, is_valid, parts, output.info, terms, output.weights)

    def check(self, is_valid: Tensor) -> None:
        missing = 1 - is_valid.float().mean().item()
        if missing > self.max_missing:
            raise TooManyMissingRewards(
                f"{missing:.0%} of the rewards are missing, more than max_missing={self.max_missing:.0%}; "
                "see the errors above"
            )
