"""The frozen reference: the policy's own network with its LoRA switched off, so no second copy of
the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from lightning import LightningModule
from torch import Tensor

from flowrl.models.protocol import FlowModel
from flowrl.objectives.micro_batch import Group
from flowrl.rollout import replay
from flowrl.samplers.protocol import Sampler
from flowrl.schedule import Interval
from flowrl.tuning.protocol import Tuning
from flowrl.types import Conditioning, Trajectory


class ReferenceModule(LightningModule):
    """Evaluates steps under the base weights, at its own guidance scale, without gradients."""

    model: FlowModel

    def __init__(self, *, model: FlowModel, tuning: Tuning, guidance_scale: float) -> None:
        super().__init__()
        self.__dict__["model"] = model  # not a child module: its weights are the policy's
        self.tuning = tuning
        self.guidance_scale = guidance_scale

    @torch.no_grad()
    def velocity(
        self, x: Float[Tensor, "B C H W"], sigma: float, conditioning: Conditioning
    ) -> Tensor:
        with self.tuning.at_reference():
            return self.model.velocity(x, sigma, conditioning, self.guidance_scale)

    def mean(
        self,
        trajectory: Trajectory,
        index: int,
        group: Group,
        intervals: Sequence[Interval],
        sampler: Sampler,
    ) -> Float[Tensor, "B C H W"]:
        """The reference's mean of the trajectory's `index`-th stochastic step."""
        return replay(group.field(self.velocity), trajectory, index, intervals, sampler).mean
