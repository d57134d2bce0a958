"""A scorer is asked so that a sample which it cannot take costs no other sample its score."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from flowrl.rewards.clips import Clips, as_clips, score_frames
from flowrl.rewards.outputs import concatenate, fill, missing
from flowrl.rewards.protocol import (
    Images,
    Reward,
    asks_for_whole_clips,
    asks_for_whole_groups,
    check_output,
    hands_on,
)
from flowrl.types import Prompt, RewardOutput

log = logging.getLogger(__name__)

HOPELESS = 4
"""Pieces of a call that all raise: the fault is then taken for the scorer's, which is asked no
further.
"""


Shown = Images | Clips | Float[Tensor, "B F 3 H W"]
"""What a scorer is shown: images, or clips for one that asks for them or hands them on."""


def attempt(
    reward: Reward, images: Images | Clips, prompts: Sequence[Prompt], name: str = "reward"
) -> RewardOutput:
    """Score all samples, of clips some frames unless `reward` asks for whole ones; see
    `flowrl.rewards.clips`. Samples for which it raises are missing, with the exception as their
    reason.

    A call that raises is repeated on its halves, and on theirs, until the samples at fault stand
    alone, or until `HOPELESS` pieces have raised and nothing has been scored. A group that a scorer
    asks for whole is not halved. An output of the wrong form is no sample's fault, and makes all
    samples missing at once. The log calls the reward `name`.

    Raises torch.OutOfMemoryError as it is: a device that is too small fails in every call.
    """
    if hands_on(reward):
        return _ask(reward, images, prompts, name)
    if asks_for_whole_clips(reward):
        return _ask(reward, as_clips(images), prompts, name)
    if isinstance(images, Clips):
        return score_frames(
            lambda frames, of_frames: _ask(reward, frames, of_frames, name),
            asks_for_whole_groups(reward),
            images,
            prompts,
        )
    return _ask(reward, images, prompts, name)


def _ask(reward: Any, images: Shown, prompts: Sequence[Prompt], name: str) -> RewardOutput:
    """Ask a scorer for what it takes, as `attempt` says."""
    try:
        output = reward(images, prompts)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # any failure of a scorer, whoever wrote it, is a missing reward
        log.exception("%s failed on %d images", name, len(prompts))
        if asks_for_whole_groups(reward):
            return _all_missing(reward, prompts, _told(error))
        return _score_by_halves(reward, images, prompts, _told(error))
    try:
        return check_output(output, len(prompts))
    except Exception as error:  # an output may be anything at all
        log.exception("%s failed on %d images: its output is unusable", name, len(prompts))
        return _all_missing(reward, prompts, _told(error))


def _score_by_halves(
    reward: Any, images: Shown, prompts: Sequence[Prompt], first_reason: str
) -> RewardOutput:
    """Put the scores of a call that has raised, for `first_reason`, together from smaller calls."""
    scored: dict[int, RewardOutput] = {}
    reasons = dict.fromkeys(range(len(prompts)), first_reason)
    pieces = _halves(range(len(prompts)))
    while pieces:
        failed = []
        for rows in pieces:
            output = _score_rows(reward, images, prompts, rows)
            if isinstance(output, str):
                reasons |= dict.fromkeys(rows, output)
                failed.append(rows)
            else:
                scored[rows.start] = output
                for row in rows:
                    del reasons[row]
        if not scored and len(failed) >= HOPELESS:
            break
        pieces = list(chain.from_iterable(map(_halves, failed)))
    if not scored:
        return _all_missing(reward, prompts, first_reason)
    return fill(concatenate([scored[start] for start in sorted(scored)]), reasons)


def _score_rows(
    reward: Any, images: Shown, prompts: Sequence[Prompt], rows: range
) -> RewardOutput | str:
    """Score some of the samples; return the reason where that fails."""
    piece = slice(rows.start, rows.stop)
    try:
        return check_output(reward(images[piece], prompts[piece]), len(rows))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return _told(error)


def _all_missing(reward: Reward, prompts: Sequence[Prompt], reason: str) -> RewardOutput:
    return missing(len(prompts), reason, getattr(reward, "weights", None))


def _halves(rows: range) -> list[range]:
    """Cut some rows in two; a single row has no halves."""
    if len(rows) < 2:
        return []
    middle = (rows.start + rows.stop) // 2
    return [range(rows.start, middle), range(middle, rows.stop)]


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
