"""Captions of the shapes world make prompt sets, with the held-out combinations kept apart."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

from flowrl.errors import UserError
from flowrl.shapes.grammar import FAMILIES, sample_caption
from flowrl.types import Prompt
from flowrl.values.bounds import Prompts, Seed, Text
from flowrl.values.check import checked

HELD_OUT_FAMILIES = tuple(
    name for name in FAMILIES if name not in ("single", "counting", "two_objects")
)
"""Families that have held-out captions: without a colour and without a relation nothing can be held
out.
"""


@checked("prompts")
def shapes_prompts(
    *,
    split: Literal["held_in", "held_out"],
    count: Prompts,
    seed: Seed,
    families: Sequence[Text] | None = None,
) -> list[Prompt]:
    """Draw `count` captions in equal shares of the task families, with replacement; of `families`
    alone where there are some.

    `held_in` never contains a reserved combination (`Caption.is_held_out`); `held_out` only such
    captions, from the families that have any. Raises UserError for a family that the split does
    not have.
    """
    wants_held_out = split == "held_out"
    names = HELD_OUT_FAMILIES if wants_held_out else FAMILIES
    if families is not None:
        names = _chosen(families, names, split)
    rng = random.Random(f"prompts {split} {seed}")
    prompts: list[Prompt] = []
    # Families take turns; a caption of the other split is drawn again, from the same family.
    while len(prompts) < count:
        family = names[len(prompts) % len(names)]
        caption = sample_caption(family, rng)
        if caption.is_held_out == wants_held_out:
            prompts.append(Prompt(caption.text, caption.family))
    return prompts


def _chosen(families: Sequence[str], possible: Sequence[str], split: str) -> tuple[str, ...]:
    """Return the families that were asked for in the order of those that are possible."""
    unknown = sorted(set(families) - set(possible))
    if unknown or not families:
        refused = ", ".join(unknown) or "none"
        known = ", ".join(possible)
        raise UserError(
            f"families: {refused} not among those of split={split}: {known}; null takes all"
        )
    return tuple(name for name in possible if name in families)
