"""The bytes that code on PyTorch's meta device would have alive at once, with attention as a fused
kernel's, and the operations that it would take, on how many tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


class Peak(TorchDispatchMode):
    """Count the bytes of all tensors made while it is active and still alive; `peak` is the most
    there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(storage) for storage in _storages((args, kwargs or {}))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if id(storage) not in self._seen | before:
                self._take(storage)
        return result

    def _take(self, storage: Any) -> None:
        key = id(storage)
        size = storage.nbytes()
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def _storages(tree: Any) -> list[Any]:
    """List the storages of the tensors in a tree of containers."""
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class FusedAttention(torch.autograd.Function):
    """Keep what a fused kernel keeps: its inputs, its output, and a number per query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(
            query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32)
        )
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def fused(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """Compute attention with the memory of a fused kernel, whatever the mask and its options."""
    return FusedAttention.apply(query, key, value)


def size(module: nn.Module) -> int:
    """Count the bytes of a module's parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def peak_of(work: Callable[[], object]) -> int:
    """Return the most bytes that were alive at once in `work`, beyond what was there before."""
    plain = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = fused
    try:
        with Peak() as counter:
            work()
        return counter.peak
    finally:
        functional.scaled_dot_product_attention = plain


def step_at_once(optimizer: Optimizer) -> None:
    """Have a step take all weights together, with a temporary of all, unless it was told how: on a
    GPU this is PyTorch's choice for weights that are whole.
    """
    for group in optimizer.param_groups:
        if group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True


def flops_of(work: Callable[[], object]) -> int:
    """Return the floating-point operations of all matrix products and convolutions in `work`, those
    of attention among them; a multiplication and the addition after it are two.
    """
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def tokens_of(network: nn.Module, work: Callable[[], object]) -> int:
    """Return the most tokens, of all rows together, that went through one of the network's linear
    layers in `work`.
    """
    counts: list[int] = []

    def note(layer: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
        counts.append(inputs[0].numel() // layer.in_features)

    layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        work()
    finally:
        for hook in hooks:
            hook.remove()
    return max(counts, default=1)
