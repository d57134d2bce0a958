"""The course of the learning rate: functions from progress to a factor of the optimizer's rate.

`progress` is the share of the run's iterations that are finished, in [0, 1). A function of it alone
needs no state, so a resumed run goes on with the same rates, unless it is given another number of
iterations: then the course is that of the new length.
"""

from __future__ import annotations

import math

from flowrl.values.bounds import Share


def constant(progress: float) -> float:
    """Return 1 throughout, as every published recipe has it."""
    return 1.0


def cosine(progress: float, *, final: Share) -> float:
    """Fall along half a cosine from 1 to `final`."""
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2
