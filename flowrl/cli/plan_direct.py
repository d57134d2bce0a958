"""An update's passes where its gradient goes through the sampler and the autoencoder, for plans."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from flowrl.losses.protocol import DirectLoss
from flowrl.objectives.direct import to_data
from flowrl.samplers.protocol import Solver
from flowrl.schedule import Interval
from flowrl.types import Conditioning

STEP = Interval(0.5, 0.25, 0.5)
"""Any step: its sigmas change neither memory nor operations."""


def draw_with_graph(plan: Any, x: Tensor, embeddings: Conditioning) -> Tensor:
    """Make the passes of a term, from the state before the last steps to images, with a graph. The
    scorer's are left out: its network is not built.
    """
    method = plan.method
    loss = cast(DirectLoss, method.loss)

    def field(x: Tensor, sigma: float, is_shared: bool) -> Tensor:
        velocity: Tensor = plan.model.velocity(x, sigma, embeddings, method.guidance_scale)
        return velocity

    steps = [STEP] * (loss.last_steps if loss.path == "steps" else 1)
    is_recomputed = bool(plan.model.transformer.is_gradient_checkpointing)
    x0, _ = to_data(loss.path, cast(Solver, method.sampler), steps, field, x, is_recomputed)
    images: Tensor = plan.model.decode_with_graph(x0)
    return images
