"""The interface of a tuning: which weights of a transformer are trained, and what they are held
near.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn


class Tuning(Protocol):
    """The trained weights of one transformer, and its frozen reference.

    Nothing is noted on the transformer itself: whoever trains, averages, saves or measures these
    weights holds this object. `flowrl.tuning.weights` loads and swaps them.
    """

    folder_name: ClassVar[str]
    """The name of the folder, in a run's, that a finished run exports its weights to."""
    reference: dict[str, Tensor] | None
    """The reference's weights by name, which stand in place of the trained ones; None where it is
    the base alone.
    """

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by name, in a fixed order: those that are there now, since
        dividing the weights puts others in their places.
        """
        ...

    def at_reference(self) -> AbstractContextManager[None]:
        """Run under the reference's weights; nothing may be backpropagated meanwhile."""
        ...

    def at_base(self) -> AbstractContextManager[None]:
        """Run the base model alone, as it was before anything was trained, whatever the reference
        is; nothing may be backpropagated meanwhile.
        """
        ...

    def save(self, pipeline: Any, folder: Path) -> None:
        """Write the weights for the stock classes of diffusers; `pipeline` is the transformer's."""
        ...


class TuningRecipe(Protocol):
    """The content of a file of conf/tuning, which makes a `Tuning` of a transformer."""

    def check_layers(self, transformer: nn.Module) -> None:
        """Raise UserError, naming the key, where the transformer has no layers for it."""
        ...

    def attach(self, transformer: nn.Module, seed: int) -> Tuning:
        """Make weights of the transformer trainable, new ones drawn by `seed`."""
        ...
