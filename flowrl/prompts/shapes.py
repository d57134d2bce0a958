"""Captions of the shapes world as prompt sets, with the held-out combinations kept apart."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

from flowrl.errors import UserError
from flowrl.shapes.grammar import FAMILIES, sample_caption
from flowrl.types import Prompt
from flowrl.values.bounds import Prompts, Seed, Text


def shapes_prompts(
    *,
    split: Literal["held_in", "held_out"],
    count: Prompts,
    seed: Seed,
    families: Sequence[Text] | None = None,
) -> list[Prompt]:
    """`count` captions in equal shares of the task families, drawn with replacement; of `families`
    alone where given.

    `held_in` never contains a reserved combination (`Caption.is_held_out`); `held_out` only such
    captions, from the families that have any.
    """
    if split not in ("held_in", "held_out"):
        raise UserError(f"split={split!r} must be held_in or held_out")
    if count < 1:
        raise UserError(f"count={count} must be at least 1")
    wants_held_out = split == "held_out"
    # Without a colour and without a relation nothing can be held out.
    possible = [
        name
        for name in FAMILIES
        if not wants_held_out or name not in ("single", "counting", "two_objects")
    ]
    if families is not None and (not families or (unknown := set(families) - set(possible))):
        named = ", ".join(sorted(unknown)) if families else "none"
        raise UserError(
            f"families: {named} not among those of split={split}: {', '.join(possible)}; null "
            "takes all"
        )
    families = possible if families is None else [name for name in possible if name in families]
    rng = random.Random(f"prompts {split} {seed}")
    prompts: list[Prompt] = []
    while len(prompts) < count:
        caption = sample_caption(families[len(prompts) % len(families)], rng)
        if caption.is_held_out == wants_held_out:
            prompts.append(Prompt(caption.text, caption.family))
    return prompts
