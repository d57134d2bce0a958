"""The frozen reference: the policy's own network under its reference weights, no second one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from lightning import LightningModule
from torch import Tensor

from flowrl.models.protocol import FlowModel
from flowrl.objectives.micro_batch import ConditionedRows
from flowrl.rollout import replay
from flowrl.samplers.protocol import Sampler
from flowrl.schedule import Interval
from flowrl.tuning.protocol import Tuning
from flowrl.types import Conditioning, Trajectory


class ReferenceModule(LightningModule):
    """The reference evaluates steps at its own guidance scale, without gradients."""

    model: FlowModel

    def __init__(self, *, model: FlowModel, tuning: Tuning, guidance_scale: float) -> None:
        super().__init__()
        self.__dict__["model"] = model  # not a child module: its weights are the policy's
        self.tuning = tuning
        self.guidance_scale = guidance_scale

    @torch.no_grad()
    def velocity(
        self, x: Float[Tensor, "B *X"], sigma: float, conditioning: Conditioning
    ) -> Float[Tensor, "B *X"]:
        """Evaluate the reference's velocity at states x of one sigma."""
        with self.tuning.at_reference():
            return self.model.velocity(x, sigma, conditioning, self.guidance_scale)

    def mean(
        self,
        trajectory: Trajectory,
        index: int,
        conditioned: ConditionedRows,
        intervals: Sequence[Interval],
        sampler: Sampler,
    ) -> Float[Tensor, "B *X"]:
        """Evaluate the reference's mean of the trajectory's `index`-th trained step.

        The state is the rollout's own, at the reference's own guidance scale.
        """
        return replay(conditioned.field(self.velocity), trajectory, index, intervals, sampler).mean
