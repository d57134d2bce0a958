"""Full fine-tuning: every weight of the transformer is trained, and a frozen copy of the start is
the reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from flowrl.errors import UserError
from flowrl.values.bounds import Text

_START = "_flowrl_start"


@dataclass(frozen=True, slots=True, kw_only=True)
class Full:
    """Stands where a LoRA would: `attach` makes all weights trainable. `dtype` is the model's, and
    must be float32.
    """

    dtype: Text

    def __post_init__(self) -> None:
        if self.dtype != "float32":
            raise UserError(
                f"model.dtype={self.dtype} with tuning=full: an optimizer's small steps are lost "
                "in the rounding of "
                f"{self.dtype} weights; set model.dtype=float32"
            )

    def attach(self, transformer: nn.Module, seed: int) -> None:
        """Nothing is drawn, so `seed` has no effect. Keeps a copy of every weight.

        Raises UserError for weights that are not float32, whatever the configuration says they are.
        """
        if odd := {str(weight.dtype) for weight in transformer.parameters()} - {"torch.float32"}:
            raise UserError(
                f"tuning=full with weights in {', '.join(sorted(odd))}; set model.dtype=float32"
            )
        keep_start(transformer.requires_grad_(True))


def keep_start(transformer: nn.Module) -> None:
    """Remember every weight as it is: from now on all of them count as trained, and these as the
    base.
    """
    start = {name: value.detach().clone() for name, value in transformer.named_parameters()}
    transformer.__dict__[_START] = start  # a plain attribute: no part of the module's state


def start_of(transformer: nn.Module) -> dict[str, Tensor] | None:
    """The weights before training by name; None where the transformer is not fully trained."""
    start: dict[str, Tensor] | None = transformer.__dict__.get(_START)
    return start


@contextmanager
def at_start(transformer: nn.Module, start: dict[str, Tensor]) -> Iterator[None]:
    """Run with the weights of `start`, by name. Both sets stay in place: only what parameters point
    at changes.

    Nothing may be backpropagated meanwhile; graphs built before or after are unaffected.
    """
    parameters = dict(transformer.named_parameters())
    trained = {name: parameters[name].data for name in start}
    for name in start:
        start[name] = start[name].to(parameters[name].device)  # once: afterwards it is there
        parameters[name].data = start[name]
    try:
        yield
    finally:
        for name, value in trained.items():
            parameters[name].data = value
