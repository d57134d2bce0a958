"""The reward module: holds the frozen scorer, moves it, and turns failures into missing rewards."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any

import torch
from jaxtyping import Bool, Float
from lightning import LightningModule
from torch import Tensor, nn

from flowrl import background
from flowrl.advantages import weighted_sum
from flowrl.errors import UserError
from flowrl.rewards.outputs import LARGEST, REASON, concatenate, first_reason, is_usable, missing
from flowrl.rewards.protocol import Images, Reward, checked
from flowrl.types import Prompt, RewardOutput

log = logging.getLogger(__name__)

PATIENCE = 5
"""Iterations in a row without a prompt that the reward judges, after which a run stops. One may come by chance."""


class TooManyMissingRewards(RuntimeError):
    """More rewards failed than `max_missing` allows."""


class RewardModule(LightningModule):
    """Scores images without gradients. What raises, is no number or has the wrong length marks samples missing.

    `submit` scores in the background while the next images are drawn; calls never overlap each other, so that a scorer
    need not be thread-safe. `check` raises TooManyMissingRewards where more than `max_missing` (a share) of the
    samples that a reward judges failed.
    """

    def __init__(self, *, reward: Reward, max_missing: float) -> None:
        super().__init__()
        if not 0 <= max_missing <= 1:
            raise UserError(f"max_missing={max_missing} must be in [0, 1]")
        self.reward = reward
        self.max_missing = max_missing
        self.num_idle = 0
        self.newest: Future[RewardOutput] | None = None
        if isinstance(reward, nn.Module):
            reward.requires_grad_(False).eval()

    def submit(self, images: Float[Tensor, "B 3 H W"], prompts: Sequence[Prompt]) -> Future[RewardOutput]:
        """Score in a background thread, after everything submitted before; `collect` waits for it."""
        earlier = self.newest

        def work() -> RewardOutput:
            if earlier is not None:
                wait([earlier])
            if images.is_cuda:
                # The current device belongs to a thread, as does the stream: the default one, in the order of calls.
                torch.cuda.set_device(images.device)
            return self.score(images, prompts)

        self.newest = background.start(work, "reward")
        return self.newest

    def collect(self, scores: Sequence[Future[RewardOutput]]) -> RewardOutput:
        """What was submitted, in the given order, once all of it is there."""
        return concatenate([score.result() for score in scores])

    @torch.no_grad()
    def score(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        """Checked scores on the CPU, with `terms` and `applies`; values and terms are NaN where no reward applies."""
        try:
            output = checked(self.reward(images, prompts), len(prompts))
        except Exception as error:  # any failure of a scorer, whoever wrote it, is a missing reward
            log.exception("reward failed on %d images: all are marked missing", len(prompts))
            reason = f"{type(error).__name__}: {error}"
            output = missing(len(prompts), reason, getattr(self.reward, "weights", None))
        values = output.values.float().cpu()
        parts = {name: part.float().cpu() for name, part in output.parts.items()}
        parts = {name: part.where(is_usable(part), torch.nan) for name, part in parts.items()}
        terms = (values[:, None] if output.terms is None else output.terms).float().cpu()
        applies = torch.ones_like(terms, dtype=torch.bool) if output.applies is None else output.applies.cpu()
        is_valid = output.is_valid.cpu() & (is_usable(terms) | ~applies).all(1)
        is_valid &= is_usable(values) | ~applies.any(1)
        values, terms = torch.where(is_valid, values, 0.0), torch.where(is_valid[:, None], terms, 0.0)
        values, terms = values.masked_fill(~applies.any(1), torch.nan), terms.masked_fill(~applies, torch.nan)
        info = _with_reasons(output.info, is_valid)
        return RewardOutput(values, is_valid, parts, info, terms, output.weights, applies)

    def total(self, terms: Float[Tensor, "B R"], weights: Float[Tensor, "R"]) -> Float[Tensor, "B"]:
        """The weighted sum of an iteration's terms.

        Raises ValueError where no reward applied to any prompt of `PATIENCE` iterations in a row.
        """
        self.num_idle = self.num_idle + 1 if terms.isnan().all() else 0
        if self.num_idle == PATIENCE:
            raise UserError(
                f"reward applied to no prompt of {PATIENCE} iterations in a row, so nothing can be learned; choose "
                "data whose prompts it can judge (reward=ocr needs text in quotes), or another reward"
            )
        return weighted_sum(terms, weights)

    def check(
        self, is_valid: Bool[Tensor, "B"], terms: Float[Tensor, "B R"], info: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """Raise where too many are missing; the message tells the first reason found in `info`.

        The share is that of the samples with a term that is not NaN: where no reward applies, none can fail.
        """
        is_judged = ~terms.isnan().all(1)
        num_missing, num_judged = int((~is_valid & is_judged).sum()), int(is_judged.sum())
        # A quotient of counts rounds to the very float that the same share in YAML does, so that it is not above it.
        share = num_missing / max(num_judged, 1)
        if share > self.max_missing:
            reason = first_reason(info)
            cause = f"the first: {reason}" if reason else "see the errors above"
            raise TooManyMissingRewards(
                f"{share:.0%} of the rewards are missing ({num_missing} of {num_judged}), more than "
                f"max_missing={self.max_missing:.0%}; {cause}"
            )


def _with_reasons(info: Sequence[Mapping[str, Any]], is_valid: Tensor) -> list[Mapping[str, Any]]:
    """One entry a sample; a missing one has a reason."""
    entries = list(info) if len(info) == len(is_valid) else [{} for _ in is_valid]
    unknown = {REASON: f"the reward gave no number, or one beyond {LARGEST:.0e}"}
    return [entry if ok else unknown | dict(entry) for entry, ok in zip(entries, is_valid.tolist(), strict=True)]
