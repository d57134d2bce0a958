"""Subsets of prompts are chosen here, where not all are taken, and equal prompts are found."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Int

from flowrl.types import Prompt
from flowrl.values.bounds import Subset
from flowrl.values.check import checked

WAYS = {"even": "evenly spread", "first": "the first"}
"""Ways to take a subset, and how each is told."""


@checked("evaluation")
def chosen(total: int, wanted: int | None, subset: Subset) -> list[int]:
    """Return the places of `wanted` of `total` things, in order; all of them where None or more
    are wanted.

    `first` takes the first ones: for sets that are drawn by lot, any of whose places is as good as
    another. `even` cuts the whole into equal stretches and takes one place from each, by a lot that
    is always the same: files are sorted by what their prompts are about, so that their first lines
    are of a few kinds; and fixed distances would fall in step with a file that takes its kinds in
    turn.
    """
    if wanted is None or wanted >= total:
        return list(range(total))
    if subset == "first" or wanted == 0:
        return list(range(wanted))
    lots = random.Random(0)
    # Stretch i goes from the i-th start to the next one; whole numbers keep them equal within one.
    starts = [i * total // wanted for i in range(wanted + 1)]
    places = []
    for start, end in pairwise(starts):
        place = start + int(lots.random() * (end - start))
        places.append(place)
    return places


def same_texts(prompts: Sequence[Prompt]) -> Int[np.ndarray, "P"]:
    """Number the prompts, with one number for those of one text, and of one picture where they
    carry any, which are drawn from one distribution of images.
    """
    # A text takes the next number when it first comes, and keeps it.
    numbers: dict[str, int] = {}
    rows = [numbers.setdefault(prompt.key, len(numbers)) for prompt in prompts]
    return np.array(rows, dtype=np.int64)
