"""Asking a scorer so that a sample which it cannot take costs no other sample its score."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from flowrl.rewards.outputs import concatenate, fill, missing
from flowrl.rewards.protocol import Images, Reward, checked
from flowrl.types import Prompt, RewardOutput

log = logging.getLogger(__name__)

HOPELESS = 4
"""Pieces of a call that all raise: the fault is then taken for the scorer's, which is asked no
further.
"""


def attempt(
    reward: Reward, images: Images, prompts: Sequence[Prompt], name: str = "reward"
) -> RewardOutput:
    """The scores of all samples; those for which `reward` raises are missing, with the exception as
    their reason.

    A call that raises is repeated on its halves, and on theirs, until the samples at fault stand
    alone, or until `HOPELESS` pieces have raised and nothing has been scored. An output of the
    wrong form is no sample's fault, and makes all samples missing at once. The log calls the reward
    `name`.
    """
    try:
        output = reward(images, prompts)
    except Exception as error:  # any failure of a scorer, whoever wrote it, is a missing reward
        log.exception("%s failed on %d images", name, len(prompts))
        return _by_halves(reward, images, prompts, error)
    try:
        return checked(output, len(prompts))
    except Exception as error:  # an output may be anything at all
        log.exception("%s failed on %d images: its output is unusable", name, len(prompts))
        return missing(len(prompts), _told(error), getattr(reward, "weights", None))


def _by_halves(
    reward: Reward, images: Images, prompts: Sequence[Prompt], error: Exception
) -> RewardOutput:
    """The scores of a call that has raised `error`, from smaller ones."""
    scored: dict[int, RewardOutput] = {}
    failed = [range(len(prompts))]
    reasons = dict.fromkeys(failed[0], _told(error))
    while failed and (scored or len(failed) < HOPELESS):
        halves = [half for rows in failed for half in _halves(rows)]
        failed = []
        for rows in halves:
            piece = slice(rows.start, rows.stop)
            try:
                scored[rows.start] = checked(reward(images[piece], prompts[piece]), len(rows))
            except Exception as fault:
                reasons |= dict.fromkeys(rows, _told(fault))
                failed.append(rows)
            else:
                reasons = {row: reason for row, reason in reasons.items() if row not in rows}
    if not scored:
        return missing(len(prompts), _told(error), getattr(reward, "weights", None))
    return fill(concatenate([scored[start] for start in sorted(scored)]), reasons)


def _halves(rows: range) -> list[range]:
    """Both halves of some rows; a single row has none."""
    middle = (rows.start + rows.stop) // 2
    return [range(rows.start, middle), range(middle, rows.stop)] if len(rows) > 1 else []


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
