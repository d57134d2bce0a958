"""A LoRA that nobody trains is added to a transformer's layers for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from flowrl.tuning import formats
from flowrl.tuning.lora_file import LoRAFile


@dataclass(slots=True)
class _Addition:
    """The term that a LoRA adds to one layer: scale B (A x)."""

    layer: nn.Module
    a: Float[Tensor, "R I"]
    b: Float[Tensor, "O R"]
    scale: float

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return the layer's output with the LoRA's, computed in float32 and rounded once, as peft
        does.
        """
        low = functional.linear(inputs[0].to(self.a.dtype), self.a)
        total: Tensor = output + functional.linear(low, self.b) * self.scale
        return total.to(output.dtype)

    def to(self, device: torch.device) -> None:
        self.a = self.a.to(device)
        self.b = self.b.to(device)


class FrozenLoRA:
    """The LoRA of a file beside the weights of a transformer, to which it is no module or
    parameter: the adapter that is trained may have other layers and ranks, and keeps its names.

    It must be made before that adapter is attached, while layers have their plain names. Raises
    UserError where the LoRA, read from `path`, does not fit the transformer.
    """

    def __init__(self, lora_file: LoRAFile, transformer: nn.Module, path: Path) -> None:
        formats.check(lora_file, transformer, path)
        self._additions = [
            _Addition(
                # An adapter that wraps the layer later calls it as its base.
                layer=transformer.get_submodule(name),
                a=a,
                b=lora_file.b[name],
                scale=lora_file.alpha[name] / a.shape[0],
            )
            for name, a in lora_file.a.items()
        ]

    @contextmanager
    def added(self) -> Iterator[None]:
        """Run the transformer with this LoRA on top of whatever else it runs with.

        Nothing may be backpropagated through it or meanwhile. A compiled layer does not notice it.
        """
        with ExitStack() as stack:
            for addition in self._additions:
                handle: Any = addition.layer.register_forward_hook(addition)
                stack.callback(handle.remove)
            yield

    @property
    def nbytes(self) -> int:
        """The bytes of its matrices."""
        return sum(addition.a.nbytes + addition.b.nbytes for addition in self._additions)

    def to(self, device: torch.device) -> FrozenLoRA:
        """Move its matrices to a device, in place."""
        for addition in self._additions:
            addition.to(device)
        return self
