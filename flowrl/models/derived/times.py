"""The times of a pipeline: which timestep belongs to a sigma, and which of its sigmas is
FlowRL's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowrl.errors import UserError
from flowrl.models.derived.leaving import Refused

ROUNDING = 1e-6
"""The share by which a timestep may miss its function of sigma: float32's rounding, a few times."""


class Times:
    """Pairs of sigma and timestep, from the grids of the pipeline itself.

    A pair is kept, so that a grid of the pipeline's gets its very timesteps. Where all timesteps of
    a grid are `scale` sigma, other sigmas get theirs by that; where they are not, other sigmas are
    refused. Some pipelines count from 0, noise, to 1, data: their sigma is 1 minus FlowRL's.
    """

    def __init__(self, sigmas: Sequence[float], timesteps: Tensor, scale: float) -> None:
        """Look at a grid of the pipeline's, without its last value.

        Raises Refused where it is no rectified flow's.
        """
        check_flow(sigmas)
        self.is_mirrored = len(sigmas) > 1 and sigmas[-1] > sigmas[0]
        self.scale = scale
        values = timesteps.double().cpu()
        error = (values - scale * torch.tensor(sigmas, dtype=torch.float64)).abs().max()
        self.is_function = timesteps.is_floating_point() and float(error) <= ROUNDING * scale
        self._pairs: dict[float, tuple[float, Tensor]] = {}

    def keep(self, sigmas: Sequence[float], timesteps: Tensor) -> tuple[float, ...]:
        """Keep a grid's pairs, and return FlowRL's sigmas, with the 0 at the end."""
        check_flow(sigmas)
        flow = [1 - sigma if self.is_mirrored else sigma for sigma in sigmas]
        for number, sigma in enumerate(flow):
            self._pairs[sigma] = (sigmas[number], timesteps[number : number + 1].cpu())
        return (*flow, 0.0)

    def at(self, sigma: float) -> tuple[float, Tensor]:
        """Return the pipeline's sigma and timestep for one of FlowRL's.

        Raises UserError where the timestep is not known.
        """
        pair = self._pairs.get(sigma)
        if pair is not None:
            return pair
        if not self.is_function:
            raise UserError(
                f"schedule: sigma {sigma:g} is not on the pipeline's own grid, and its timesteps "
                "follow from no sigma alone; set schedule=pipeline"
            )
        own = 1 - sigma if self.is_mirrored else sigma
        return own, torch.tensor([own * self.scale], dtype=torch.float32)


def check_flow(sigmas: Sequence[float]) -> None:
    """Raise Refused for sigmas that are not from 0 to 1."""
    if not sigmas:
        raise Refused("its grid is empty")
    if max(sigmas) > 1 + ROUNDING or min(sigmas) < 0:
        raise Refused(
            f"its sigmas go from {sigmas[0]:g} to {sigmas[-1]:g}, which is no rectified flow's way "
            "from 1 to 0"
        )
