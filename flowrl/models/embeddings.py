"""Prompt embeddings, computed once for all prompts of a run in a fixed order, then looked up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from flowrl.models.protocol import FlowModel
from flowrl.types import Conditioning, Prompt

CHUNK = 64


class PromptEmbeddings:
    """Rows of conditioning by prompt text.

    All texts are encoded up front, sorted and in chunks of one size, so that an embedding never depends on the batch
    it is first asked for in, and a resumed run sees the same bits.
    """

    def __init__(self, model: FlowModel, prompts: Iterable[Prompt]) -> None:
        texts = sorted({prompt.text for prompt in prompts})
        self._row = {text: row for row, text in enumerate(texts)}
        padded = texts + [texts[-1]] * (-len(texts) % CHUNK)
        chunks = [model.encode_prompts(padded[i : i + CHUNK]) for i in range(0, len(padded), CHUNK)]
        self._all = _concatenate(chunks)

    def to(self, device: torch.device) -> None:
        """Move all rows."""
        self._all = _move(self._all, device)

    def __call__(self, prompts: Sequence[Prompt]) -> Conditioning:
        """The rows of some prompts, all of which must have been given at construction."""
        return self._all[torch.tensor([self._row[prompt.text] for prompt in prompts])]


def _move(rows: Conditioning, device: torch.device) -> Conditioning:
    negative = None if rows.negative is None else _move(rows.negative, device)
    return Conditioning(rows.tokens.to(device), rows.pooled.to(device), negative)


def _concatenate(chunks: Sequence[Conditioning]) -> Conditioning:
    def join(name: str) -> Tensor:
        return torch.cat([getattr(chunk, name) for chunk in chunks])

    negatives = [chunk.negative for chunk in chunks if chunk.negative is not None]
    return Conditioning(join("tokens"), join("pooled"), _concatenate(negatives) if negatives else None)
