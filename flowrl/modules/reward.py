"""The reward module: holds the frozen scorer, moves it, and turns failures into missing rewards."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from jaxtyping import Float
from lightning import LightningModule
from torch import Tensor, nn

from flowrl.advantages import weighted_sum
from flowrl.rewards.protocol import Images, Reward, checked
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
    def score(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        """Checked scores on the CPU, with `terms` and `applies`; values and terms are NaN where no reward applies."""
        try:
            output = checked(self.reward(images, prompts), len(prompts))
        except Exception:  # any failure of a scorer, whoever wrote it, is a missing reward
            log.exception("reward failed on %d images: all are marked missing", len(prompts))
            weights = getattr(self.reward, "weights", (1.0,))
            none = torch.zeros(len(prompts), len(weights))
            return RewardOutput(none[:, 0], none[:, 0].bool(), terms=none, weights=weights, applies=none == 0)
        values = output.values.float().cpu()
        parts = {name: part.float().cpu() for name, part in output.parts.items()}
        terms = (values[:, None] if output.terms is None else output.terms).float().cpu()
        applies = torch.ones_like(terms, dtype=torch.bool) if output.applies is None else output.applies.cpu()
        is_valid = output.is_valid.cpu() & (terms.isfinite() | ~applies).all(1)
        is_valid &= values.isfinite() | ~applies.any(1)
        values, terms = torch.where(is_valid, values, 0.0), torch.where(is_valid[:, None], terms, 0.0)
        values, terms = values.masked_fill(~applies.any(1), torch.nan), terms.masked_fill(~applies, torch.nan)
        return RewardOutput(values, is_valid, parts, output.info, terms, output.weights, applies)

    def total(self, terms: Float[Tensor, "B R"], weights: Float[Tensor, "R"]) -> Float[Tensor, "B"]:
        """The weighted sum of an iteration's terms. Raises ValueError where no reward applies to any of its prompts."""
        if terms.isnan().all():
            raise ValueError(
                "reward applies to no prompt of this iteration, so nothing can be learned; choose data whose prompts "
                "it can judge (reward=ocr needs text in quotes), or another reward"
            )
        return weighted_sum(terms, weights)

    def check(self, is_valid: Tensor) -> None:
        missing = 1 - is_valid.float().mean().item()
        if missing > self.max_missing:
            raise TooManyMissingRewards(
                f"{missing:.0%} of the rewards are missing, more than max_missing={self.max_missing:.0%}; "
                "see the errors above"
            )
