"""Strategies, which spread a run over processes, and what depends on them."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flowrl.parallel.sharding import divide, is_divided, part_of
from flowrl.values.bounds import Count, Minutes


def replicas(*, timeout_minutes: Minutes, bucket_megabytes: Count) -> DDPStrategy:
    """Keep the same weights in every process and average gradients: this suits LoRA, whose
    gradients are small.
    """
    return DDPStrategy(
        timeout=timedelta(minutes=timeout_minutes),
        bucket_cap_mb=bucket_megabytes,
        find_unused_parameters=False,
        # Buffers are constants, such as SD3.5's 0.4 GiB of places, which all processes have alike.
        broadcast_buffers=False,
        # Reduced gradients stay in their buckets, rather than being copied back. Those of the terms
        # before the last are accumulated beside the buckets all the same.
        gradient_as_bucket_view=True,
    )


def parts(*, num_processes: Count, timeout_minutes: Minutes) -> ModelParallelStrategy:
    """Keep a part of every weight, gradient and optimizer state in each process (FSDP2): for full
    fine-tuning, and for a LoRA on a base that no single GPU holds.
    """
    return ModelParallelStrategy(
        data_parallel_size=num_processes,  # Lightning's own choice would be the number of nodes
        tensor_parallel_size=1,
        save_distributed_checkpoint=False,
        timeout=timedelta(minutes=timeout_minutes),
    )


def shard(
    module: LightningModule, transformer: nn.Module, reference: dict[str, Tensor] | None
) -> bool:
    """Divide the transformer, and in place its reference's weights where it has some, if the
    strategy is `parts`; return True where this was done now.
    """
    strategy = module.trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy) or is_divided(transformer):
        return False
    divide(transformer, strategy.device_mesh["data_parallel"])
    if reference is not None:
        weights = dict(transformer.named_parameters())
        reference.update({name: part_of(whole, weights[name]) for name, whole in reference.items()})
    return True


def synchronised(module: LightningModule, is_last: bool) -> AbstractContextManager[None]:
    """Reduce gradients over processes once per optimizer step, in the backward pass of its last
    term.

    Those of divided weights are reduced in every backward pass: no process has room for the whole
    ones.
    """
    strategy = module.trainer.strategy
    if is_last or not isinstance(strategy, DDPStrategy):
        return nullcontext()
    return strategy.block_backward_sync()


def averages_gradients(module: LightningModule) -> bool:
    """Tell whether processes with the same weights average their gradients."""
    return isinstance(module.trainer.strategy, DDPStrategy)


def norm_limit(max_grad_norm: float | str) -> float:
    """Return the setting as a number. Infinity is no clipping; YAML spells it `.inf`, Hydra's
    command line `inf`.

    That it is above 0 the configuration's types have seen: at 0 every gradient would be 0, below 0
    its sign would flip.
    """
    return math.inf if isinstance(max_grad_norm, str) else max_grad_norm


def clip(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients down to a global norm of `max_norm`; return the norm before, over all
    parts of divided ones.
    """
    # The norm of divided gradients is a DTensor, whose sum over processes is still to be made.
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def is_later_rank() -> bool:
    """Tell whether this process joins a run that another one began; known before the processes
    have met.
    """
    # Lightning sets it at its import, from the variables of whoever starts the processes.
    return bool(getattr(rank_zero_only, "rank", 0))
