"""A schedule that is the base model's own is told of the model."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from flowrl.errors import UserError
from flowrl.models.protocol import FlowModel
from flowrl.schedule import PipelineGrid, Schedule


@runtime_checkable
class HasGrid(Protocol):
    """A base model that has a sigma grid of its own."""

    def grid(self, num_steps: int) -> tuple[float, ...]:
        """Return its `num_steps + 1` sigmas, from 1 to 0."""
        ...


def follow(schedule: Schedule, model: FlowModel) -> None:
    """Let `schedule=pipeline` take the model's grids.

    Raises UserError for a model that has none.
    """
    if not isinstance(schedule, PipelineGrid) or not schedule.is_open:
        return
    if not isinstance(model, HasGrid):
        raise UserError(
            f"schedule=pipeline: {type(model).__name__} has no grid of its own, only model=derived "
            "has; choose schedule=linear_shift or another one"
        )
    schedule.follow(model.grid)
