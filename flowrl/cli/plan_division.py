"""The share of a plan that comes of weights divided over processes (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, nn

from flowrl.models.experts import networks_of
from flowrl.models.quantization import is_quantized
from flowrl.parallel.sharding import blocks_of

BLOCKS_OF_A_PASS = 3
"""Whole blocks that FSDP2 holds at worst: one, the buffer it came in and the next one's."""
BLOCKS_OF_GRADIENTS = 3
"""Blocks whose whole gradients it holds in a backward pass on top of that: one's, the buffer they
leave in and the last one's. Frozen weights have none.
"""


class Gathered(NamedTuple):
    """The bytes of divided weights, and of their gradients, that a process holds whole."""

    in_pass: int
    in_update: int


def count_gathered(transformer: nn.Module, trained: Iterable[Tensor]) -> Gathered:
    """Count what is whole at worst in a pass, and in an update: what is in no block, and some
    blocks.
    """
    outside, largest = _in_blocks(transformer, transformer.parameters())
    in_pass = outside + BLOCKS_OF_A_PASS * largest
    trained_outside, most_trained = _in_blocks(transformer, trained)
    gradients = trained_outside + BLOCKS_OF_GRADIENTS * most_trained
    return Gathered(in_pass, in_pass + gradients)


def _in_blocks(transformer: nn.Module, weights: Iterable[Tensor]) -> tuple[int, int]:
    """Count the bytes of those of the transformer's weights that are in no block, and of those in
    the block that has most of them.
    """
    left = {id(weight): weight.nbytes for weight in weights}
    largest = 0
    for block in blocks_of(transformer):
        size = sum(left.pop(id(weight), 0) for weight in block.parameters())
        largest = max(largest, size)
    return sum(left.values()), largest


def can_be_divided(transformer: nn.Module) -> bool:
    """Tell whether the launch lets weights be divided: those of one network, as it was released."""
    return len(networks_of(transformer)) == 1 and not is_quantized(transformer)
