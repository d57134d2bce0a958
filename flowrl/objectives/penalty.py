"""A loss and its penalty become one output."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from flowrl.types import LossOutput


def with_penalty(
    loss: Float[Tensor, ""],
    metrics: Mapping[str, Float[Tensor, ""]],
    *,
    beta: float,
    distance: Float[Tensor, ""] | None,
) -> LossOutput:
    """Return loss + beta distance, with both of them among the metrics; None is no penalty."""
    own = {"loss/policy": loss}
    if distance is not None:
        own["loss/penalty"] = distance
        loss = loss + beta * distance
    return LossOutput(loss, own | dict(metrics))
