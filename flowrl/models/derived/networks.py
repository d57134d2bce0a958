"""The networks of a pipeline run in their own dtype, and hand out float32: a pipeline combines
guidance in the dtype of what its network gave.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn

from flowrl.models.derived.leaving import Refused
from flowrl.models.experts import FIRST


def check_networks(pipeline: Any) -> None:
    """Raise Refused unless the pipeline has a network that is trained, and an autoencoder."""
    if not isinstance(getattr(pipeline, FIRST, None), nn.Module):
        raise Refused(f"it has no {FIRST}")
    if not isinstance(getattr(pipeline, "vae", None), nn.Module):
        raise Refused("it has no vae")


def take_times_in_float32(network: nn.Module) -> None:
    """Let a network of any dtype embed times that are handed over in float32.

    Some cast a time's sines to the time's own dtype; here they get that of the layers they enter.
    """
    for module in network.modules():
        if isinstance(module, TimestepEmbedding):
            module.register_forward_pre_hook(_lower_sines)


def _lower_sines(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(module.parameters()).dtype
    return tuple(_cast(value, dtype) for value in args)


@contextmanager
def giving_float32(networks: Iterable[nn.Module], dtype: torch.dtype) -> Iterator[None]:
    """Let networks of this dtype take their state in float32, and give float32.

    The state is the first parameter of its forward; times and positions stay in float32, in which
    stock calls hand them over too, or would if their state were.
    """
    with ExitStack() as stack:
        if dtype != torch.float32:
            for network in networks:
                stack.enter_context(_giving_float32(network, dtype))
        yield


@contextmanager
def _giving_float32(network: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    first = next(iter(inspect.signature(network.forward).parameters))

    def lower(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (_cast(args[0], dtype), *args[1:]), kwargs
        return args, {**kwargs, first: _cast(kwargs[first], dtype)}

    def raise_dtype(_: nn.Module, __: Any, output: Any) -> Any:
        return _cast(output, torch.float32)

    hooks = (
        network.register_forward_pre_hook(lower, with_kwargs=True),
        network.register_forward_hook(raise_dtype),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def steps_by_network(
    networks: Mapping[str, nn.Module], ask: Callable[[int], None], num_steps: int
) -> dict[str, list[int]]:
    """Return the numbers of the steps at which each network is asked; a single network is asked at
    all. `ask` makes the call of a step. Networks are named as `networks_of` does, without the dot.

    Raises Refused for a network that is asked at none.
    """
    if len(networks) == 1:
        return {name: list(range(num_steps)) for name in networks}
    steps: dict[str, list[int]] = {prefix.removesuffix("."): [] for prefix in networks}
    for number in range(num_steps):
        for prefix in _asked(networks, ask, number):
            steps[prefix.removesuffix(".")].append(number)
    for name, numbers in steps.items():
        if not numbers:
            raise Refused(
                f"in {num_steps} steps it never asks its {name}, which would go untrained; give a "
                "higher rollout.num_steps, or a pipeline without it"
            )
    return steps


def _asked(networks: Mapping[str, nn.Module], ask: Callable[[int], None], number: int) -> set[str]:
    """Return the names of the networks that the call of a step asks."""
    names: set[str] = set()
    hooks = []
    for name, network in networks.items():
        hooks.append(network.register_forward_pre_hook(partial(_note, names, name)))
    try:
        ask(number)
    finally:
        for hook in hooks:
            hook.remove()
    return names


def _note(names: set[str], name: str, *_: Any) -> None:
    names.add(name)


@contextmanager
def decoding_in_float32(vae: Any) -> Iterator[None]:
    """Let an autoencoder of a lower dtype take latents in float32 and give images in it."""
    decode: Callable[..., Any] = vae.decode

    def cast_decode(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        return _cast(decode(latents.to(vae.dtype), *args, **kwargs), torch.float32)

    vae.decode = cast_decode
    try:
        yield
    finally:
        del vae.decode


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Return tensors of real numbers in another dtype, also those in lists and in outputs."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(item, dtype) for item in value)
    if isinstance(value, dict):  # an output of diffusers is a dictionary with attributes
        return type(value)(**{name: _cast(item, dtype) for name, item in value.items()})
    return value
