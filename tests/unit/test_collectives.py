"""What processes share with each other."""

import torch
from parallel import spawn
from torch import distributed

from flowrl.parallel.collectives import gather, gather_to_first
from flowrl.parallel.strategies import replicas


def shared(rank, count):
    """What a process has of all processes' tensors, and of those that only the first is given."""
    distributed.init_process_group("gloo", rank=rank, world_size=count)
    try:
        everywhere = gather(rank)
        pictures = gather_to_first({rank: torch.full((rank + 1,), float(rank))})
    finally:
        distributed.destroy_process_group()
    if pictures is not None:
        pictures = [{row: values.tolist() for row, values in own.items()} for own in pictures]
    return rank, everywhere, pictures


def test_what_is_large_goes_to_the_first_process_alone():
    """Tensors of one and two numbers, in rank order. Mutation: gather to all processes."""
    assert sorted(spawn(shared, 2)) == [
        (0, [0, 1], [{0: [0.0]}, {1: [1.0, 1.0]}]),
        (1, [0, 1], None),
    ]


def test_one_process_has_its_own_alone():
    """Mutation: return None where there is no process group."""
    assert gather_to_first("own") == gather("own") == ["own"]


def test_replicas_send_gradients_alone_and_copy_none_back():
    """Buffers are constants. Mutation: leave either to DDP, whose defaults are the opposite."""
    # Lightning hands these on to DistributedDataParallel, and has no other way to see them.
    options = replicas(timeout_minutes=1, bucket_megabytes=8)._ddp_kwargs
    assert not options["broadcast_buffers"]
    assert options["gradient_as_bucket_view"]
