"""A share of a number of things, counted."""

from __future__ import annotations

import math


def portion(count: int, share: float) -> int:
    """Return `share` of `count` things, rounded down, but at least one."""
    # 100 * 0.29 is 28.999... in floats, and means 29.
    return max(1, math.floor(count * share + 1e-9))
