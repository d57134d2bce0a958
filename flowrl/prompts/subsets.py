"""Which prompts of a set are taken where not all are, and which prompts are the same one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Int

from flowrl.errors import UserError
from flowrl.types import Prompt

WAYS = {"even": "evenly spread", "first": "the first"}
"""Ways to take a subset, and how each is told."""


def chosen(total: int, wanted: int | None, way: str) -> list[int]:
    """The places of `wanted` of `total` things, in order; all of them where None or more are
    wanted.

    `first` takes the first ones: for sets that are drawn by lot, any of whose places is as good as
    another. `even` cuts the whole into equal stretches and takes one place from each, by a lot that
    is always the same: files are sorted by what their prompts are about, so that their first lines
    are of a few kinds; and fixed distances would fall in step with a file that takes its kinds in
    turn.
    """
    if way not in WAYS:
        raise UserError(f"evaluation.subset={way!r} must be one of {', '.join(WAYS)}")
    if wanted is None or wanted >= total:
        return list(range(total))
    if way == "first" or wanted == 0:
        return list(range(wanted))
    lots = random.Random(0)
    starts = [i * total // wanted for i in range(wanted + 1)]
    return [start + int(lots.random() * (end - start)) for start, end in pairwise(starts)]


def same_texts(prompts: Sequence[Prompt]) -> Int[np.ndarray, "P"]:
    """A number for each prompt, equal for those of one text, which are drawn from one distribution
    of images.
    """
    numbers: dict[str, int] = {}
    return np.array(
        [numbers.setdefault(prompt.text, len(numbers)) for prompt in prompts], dtype=np.int64
    )
