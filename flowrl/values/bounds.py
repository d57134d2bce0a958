"""Short names for numbers and words with bounds, for the signatures of what a configuration builds.

A signature that says `rank: Rank` is checked before anything heavy is built, by
`flowrl.launch.validate`; `Told` is the bound in words, where those that follow from the numbers do
not say why. Every whole number has an upper bound, since one that is far too large is a slip of the
keyboard and would be waited for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen, Predicate


@dataclass(frozen=True, slots=True)
class Told:
    """The bound of a hint in words, as they follow "must be"."""

    text: str


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _is_dotted(text: str) -> bool:
    return all(map(str.isidentifier, text.split(".")))


def _is_project(name: str) -> bool:
    return not set(name) & set("/\\#?%:")


def is_folder_name(name: str) -> bool:
    """Tell whether a name may be part of a folder's name without leading elsewhere."""
    if name in ("", ".", ".."):
        return False
    # Windows' separator counts as well: a run's folder may be copied there.
    forbidden = set("/\\\0\n")
    return not set(name) & forbidden


Count = Annotated[int, Ge(1), Le(10**9)]
"""A number of anything that there must be at least one of."""

Natural = Annotated[int, Ge(0), Le(10**9)]
"""A number of anything that there may be none of."""

Seed = Annotated[int, Ge(0), Lt(2**63)]
"""Seeds that NumPy's and PyTorch's generators both take."""

Bytes = Annotated[int, Ge(1), Le(2**40)]
Prompts = Annotated[int, Ge(1), Le(1_000_000)]
"""Prompts that are drawn, and embedded, before training begins: a million take a minute, a billion
hours.
"""

Samples = Annotated[int, Ge(1), Le(1_000_000)]
"""Prompts, images or updates of an iteration, and images of a prompt."""

StepCount = Annotated[int, Ge(1), Le(1000)]
"""Steps of a sigma grid: diffusers' own timesteps end at 1,000."""

StepNumber = Annotated[int, Ge(0), Lt(1000)]
"""The number of one step of a grid, counted from 0."""

Tokens = Annotated[int, Ge(1), Le(262144)]
"""Tokens of an image: one of 8,192 pixels a side, in patches of 16, has the most."""

Rank = Annotated[int, Ge(1), Le(16384)]
"""No layer of the base models is wider; the launch also compares with the layers themselves."""

Pixels = Annotated[int, Ge(8), Le(8192)]
"""Pixels of an image's side; autoencoders halve it three times or more."""

Resolution = Annotated[
    Pixels | Annotated[Sequence[Pixels], MinLen(2), MaxLen(2)],
    Told("a whole number of at least 8 and at most 8192, or a pair of them, [height, width]"),
]
"""Size of an image in pixels: its side where it is square, or height and width."""

TextLength = Annotated[int, Ge(0), Le(4096)]
Chunk = Annotated[int, Ge(1), Le(4096)]

Alpha = Annotated[float, Gt(0), Le(65536)]
"""LoRA's alpha: the scale of its layers times their rank."""

# NaN lies within none of these bounds, and infinity within those alone that have none above.

Positive = Annotated[float, Gt(0), Le(10**6)]
NonNegative = Annotated[float, Ge(0), Le(10**6)]
Finite = Annotated[float, Predicate(math.isfinite)]
Share = Annotated[float, Ge(0), Le(1)]
Portion = Annotated[float, Gt(0), Le(1)]
"""A share that is never nothing."""
Rate = Portion
"""The word for the same bounds where a number is no share: a threshold, a rate or a power."""
BelowOne = Annotated[float, Ge(0), Lt(1)]
"""A decay or a momentum, which at 1 would never move."""
LearningRate = Annotated[Rate, Told("a number above 0 and at most 1: at 0 nothing is trained")]
Betas = Annotated[
    Sequence[BelowOne],
    MinLen(2),
    MaxLen(2),
    Told("a list of two numbers of at least 0 and below 1"),
]
"""The decays of Adam's two moments."""

Seconds = Annotated[float, Ge(0), Le(10**7)]
Duration = Annotated[float, Gt(0), Le(10**7)]
"""Seconds that something may take."""

Timeout = Annotated[float, Ge(1e-3), Le(10**6)]
"""Seconds for one answer of a service, a millisecond at least."""

Minutes = Annotated[float, Gt(0), Le(10**6)]

# Bounds of losses and samplers, which are told with their reason.

Threshold = Annotated[
    float,
    Ge(0),
    Told("a number of at least 0 (inf switches it off)"),
]
Limit = Annotated[
    float,
    Gt(0),
    Told("a number above 0; for no bound set it to inf (in YAML .inf)"),
]
Repeats = Annotated[int, Ge(0), Le(1000)]
"""Times that something is done once more, with all that it costs."""
Ceiling = Annotated[
    float,
    Predicate(lambda value: value > -math.inf),
    Told("a number; for no bound set it to inf (in YAML .inf)"),
]
ClipLow = Annotated[
    float,
    Ge(0),
    Le(1),
    Told("a number from 0 to 1: ratios are positive, and 1 must lie in the range"),
]
ClipHigh = Annotated[
    float,
    Ge(0),
    Told("a number of at least 0: the range must hold ratio 1; inf clips nothing above"),
]
NoiseLevel = Annotated[
    float,
    Ge(0),
    Le(10),
    Told("a number from 0 to 10; published levels are 0.3 to 1.2"),
]
Shift = Annotated[
    float,
    Gt(0),
    Le(100),
    Told("a number above 0 and at most 100; base models have 1 to 12"),
]
Guidance = Annotated[float, Ge(0), Le(100)]

Text = Annotated[str, MinLen(1)]
Tag = Annotated[str, MinLen(1), MaxLen(64), Told("text of at most 64 characters, W&B's limit")]
ProjectName = Annotated[
    str,
    MinLen(1),
    MaxLen(128),
    Predicate(_is_project),
    Told("text of at most 128 characters, none of them / \\ # ? % :"),
]
FolderName = Annotated[
    str,
    Predicate(is_folder_name),
    Told("a name without slashes, for the run's folder"),
]
Expression = Annotated[
    str,
    MinLen(1),
    Predicate(_is_pattern),
    Told("a regular expression"),
]
Dotted = Annotated[
    str,
    Predicate(_is_dotted),
    Told("a dotted name"),
]

Processes = Annotated[
    int,
    Ge(1),
    Le(100_000),
    Told(
        "a whole number of at least 1; with trainer.devices=auto, -1 or a list, set "
        "batch.num_processes as well"
    ),
]
Dtype = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["nf4", "int8", "fp8"]
Subset = Literal["first", "even"]
Split = Literal["train", "test"]
Quality = Annotated[int, Ge(1), Le(100), Told("a whole number from 1 to 100")]
Side = Annotated[int, Ge(32), Le(8192)]
"""Pixels to which an OCR enlarges an image's shorter side."""

NonZero = Annotated[
    float,
    Predicate(lambda value: value != 0),
    Ge(-(10**6)),
    Le(10**6),
    Told("a finite number other than 0"),
]
