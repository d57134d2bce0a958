"""The content of a LoRA file, whatever its format and however many files it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class LoRAFile:
    """The content of a LoRA file: per layer the matrices A (rank, in) and B (out, rank) and alpha;
    the layer adds alpha / rank B A x.

    `num_passed_over` counts the file's tensors that belong to text encoders. `notes` says what the
    LoRA was trained on and how, where that is known (see `flowrl.tuning.metadata`).
    """

    a: Mapping[str, Tensor]
    b: Mapping[str, Tensor]
    alpha: Mapping[str, float]
    num_passed_over: int = 0
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def ranks(self) -> dict[str, int]:
        """Return each layer's rank."""
        return {name: matrix.shape[0] for name, matrix in self.a.items()}

    def describe(self) -> str:
        """Return layers, ranks and alphas in words, and what was passed over."""
        ranks = sorted(set(self.ranks.values()))
        alphas = sorted(set(self.alpha.values()))
        text = f"{len(self.a)} layers, rank {_listed(ranks)}, alpha {_listed(alphas)}"
        if not self.num_passed_over:
            return text
        return (
            f"{text}; {self.num_passed_over} tensors of text encoders are passed over, since those "
            "are not trained"
        )


def _listed(values: list[Any]) -> str:
    return " and ".join(f"{value:g}" for value in values)
