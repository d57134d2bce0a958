"""The parts of a gradient's way that the base model has: decoding with a graph, and whether passes
are recomputed.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from flowrl.errors import UserError
from flowrl.models.protocol import DecodesWithGraph, FlowModel


def decode_with_graph(model: FlowModel, x0: Float[Tensor, "B *X"]) -> Float[Tensor, "B *F 3 H W"]:
    """Decode with a graph from x0 to the images. Raises UserError where the adapter cannot."""
    require_graph(model)
    assert isinstance(model, DecodesWithGraph)
    return model.decode_with_graph(x0)


def require_graph(model: FlowModel) -> None:
    """Raise UserError unless gradients go through the model's decoding."""
    if not isinstance(model, DecodesWithGraph):
        raise UserError(
            f"loss: gradients go through decoding, for which {type(model).__name__} has no "
            "decode_with_graph; give it one (flowrl.models.protocol.DecodesWithGraph), or choose "
            "another loss"
        )


def recomputes(transformer: nn.Module) -> bool:
    """Tell whether backward passes recompute what they need, as
    `backend.gradient_checkpointing` says.
    """
    return bool(getattr(transformer, "is_gradient_checkpointing", False))
