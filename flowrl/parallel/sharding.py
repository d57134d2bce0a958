"""FSDP2: every process holds a part of each weight, gradient and optimizer state; whole again for
files.

Divided tensors are DTensors under the names they had. Everything here works in place on a
transformer whose class names its blocks, as those of diffusers do.

A LoRA is divided with the layers that it belongs to. FSDP2 wants one dtype of a block's trained
weights alone, so that float32 may lie beside a frozen base in bfloat16; of different dtypes a block
is gathered as bytes. Whole in every process (`ignored_params`), a LoRA would spare hardly any
communication, since the base is gathered in every pass anyway, and would take what dividing is for:
one of rank 64 on all of FLUX.2-dev's layers is 1.5 GiB, five times over with its gradient, its
average and Adam's state.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def divide(transformer: nn.Module, mesh: DeviceMesh) -> None:
    """Divide the weights of each block, then the rest, over a one-dimensional mesh; before there is
    an optimizer.

    Each part is gathered for a pass and freed after it, the rest too: a pass under other weights
    may come between a forward pass and its backward pass (the reference's does).
    """
    # The whole comes last and takes the weights that no block has taken.
    for module in [*blocks_of(transformer), transformer]:
        divided = fully_shard(module, mesh=mesh, reshard_after_forward=True)
        if mesh.device_type == "cpu":
            # gloo's reduce-scatter sums where a mean is asked for.
            divided.set_force_sum_reduction_for_comms(True)


def blocks_of(transformer: nn.Module) -> list[nn.Module]:
    """Return the modules whose weights are divided each by themselves: those whose class diffusers
    lists, by its name, as one that must stay on one device.
    """
    names = set(getattr(transformer, "_no_split_modules", None) or ())
    return [module for module in transformer.modules() if type(module).__name__ in names]


def is_divided(transformer: nn.Module) -> bool:
    """Tell whether `divide` was called: then all processes must make the same passes, gathering
    weights in each.
    """
    return isinstance(transformer, FSDPModule)


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """Return this process's part of a tensor that all have whole, divided as `like` is; the tensor
    itself where that is not.

    Raises nothing for another shape, such as an optimizer's step count: that stays whole.
    """
    if not isinstance(like, DTensor) or isinstance(whole, DTensor) or whole.shape != like.shape:
        return whole
    # No process sends anything to the others, since all of them have the whole.
    view = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    # A copy, so that the part does not keep the whole in memory.
    part: Tensor = view.clone()
    return part


def divide_copies(
    copies: Mapping[str, Mapping[str, Tensor]], trained: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Divide sets of copies of the trained weights, by kind and name, as these are divided."""
    divided: dict[str, dict[str, Tensor]] = {}
    for kind, tensors in copies.items():
        divided[kind] = {name: part_of(copy, trained[name]) for name, copy in tensors.items()}
    return divided


def gathered(tensors: Mapping[str, Tensor], is_kept: bool) -> dict[str, Tensor]:
    """Return the tensors where `is_kept`, and none where not: a divided one is made whole on the
    CPU, another is returned as it is. All processes must call this alike.
    """
    whole_tensors = {}
    for name, value in tensors.items():
        # Every process takes part in every gather, also one that does not keep the result.
        whole = value.full_tensor().detach().cpu() if isinstance(value, DTensor) else value
        if is_kept:
            whole_tensors[name] = whole
    return whole_tensors


def gathered_by_first(tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return the tensors made whole in the first process, and None in the others; to be called by
    all of them.
    """
    is_first = distributed.get_rank() == 0
    whole_tensors = gathered(tensors, is_kept=is_first)
    return whole_tensors if is_first else None


def save(transformer: nn.Module, folder: object) -> None:
    """Write a divided diffusers transformer for its class's `from_pretrained`: all processes
    gather, the first writes.

    Dividing changes a module's class in place, so the file is written by a fresh one of the class
    it had.
    """
    weights = gathered_by_first(transformer.state_dict())
    if weights is not None:
        kind = next(kind for kind in type(transformer).__mro__ if not issubclass(kind, FSDPModule))
        with torch.device("meta"):
            plain = kind.from_config(transformer.config)  # type: ignore[attr-defined]
        plain.load_state_dict(weights, assign=True)
        plain.save_pretrained(folder)
