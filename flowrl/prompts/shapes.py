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
    captions, from the families that have any.
    """
    wants_held_out = split == "held_out"
    names = HELD_OUT_FAMILIES if wants_held_out else FAMILIES
    if families is not None:
        names = _chosen(families, names, split)
    rng = random.Random(f"prompts {split} {seed}")
    prompts: list[Prompt] = []
    while len(prompts) < count:
        caption = sample_caption(names[len(prompts) % len(names)], rng)
        if caption.is_held_out == wants_held_out:
            prompts.append(Prompt(caption.text, caption.family))
    return prompts


def _chosen(families: Sequence[str], possible: Sequence[str], split: str) -> tuple[str, ...]:
    """Return the families that were asked for in the order of those that are possible."""
    unknown = sorted(set(families) - set(possible))
    if unknown or not families:
        raise UserError(
            f"families: {', '.join(unknown) or 'none'} not among those of split={split}: "
            f"{', '.join(possible)}; null takes all"
        )
    return tuple(name for name in possible if name in families)
