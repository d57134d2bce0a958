"""Trained weights are loaded in place, by name, and a model is run under others for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from flowrl.errors import UserError
from flowrl.parallel import sharding
from flowrl.tuning.protocol import Tuning
from flowrl.values.plural import counted

OTHER_SETTINGS = "give lora.rank, lora.targets and model the values that the weights were made with"
"""What to do about weights of a LoRA that do not fit."""


@torch.no_grad()
def load(
    parameters: Mapping[str, nn.Parameter],
    weights: Mapping[str, Tensor],
    *,
    remedy: str = OTHER_SETTINGS,
) -> None:
    """Copy weights into the parameters, in place.

    The weights take the parameters' dtype and device. Raises UserError, with the `remedy`,
    unless exactly the parameters' names and shapes are given.
    """
    check_shapes(parameters, shapes_of(weights), remedy=remedy)
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])


def shapes_of(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of weights by name."""
    return {name: tuple(value.shape) for name, value in weights.items()}


def check_shapes(
    weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], *, remedy: str
) -> None:
    """Raise UserError, with what to do about it, unless exactly the names and shapes of `weights`
    are given.
    """
    wanted = shapes_of(weights)
    # A name that only one side has gets None from the other, and so is a misfit too.
    names = wanted.keys() | shapes.keys()
    misfits = sorted(name for name in names if wanted.get(name) != shapes.get(name))
    if misfits:
        raise UserError(
            f"{counted(len(misfits), 'weight')} missing, too many or of another shape, the first "
            f"{misfits[0]!r}; {remedy}"
        )


@contextmanager
def swapped(
    parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]
) -> Iterator[None]:
    """Run with other weights (such as the EMA's), then restore the trained ones bitwise.

    This copies: the parameters are the same tensors before, during and after.
    """
    trained = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    load(parameters, weights)
    try:
        yield
    finally:
        load(parameters, trained)


def in_place_of_trained(
    transformer: nn.Module, parameters: Mapping[str, nn.Parameter], weights: dict[str, Tensor]
) -> AbstractContextManager[None]:
    """Run a transformer with a reference's weights, without a copy of the trained ones where one
    can be spared.
    """
    # Passes of divided weights read them from where they are, not from what parameters point at.
    if sharding.is_divided(transformer):
        return swapped(parameters, weights)
    return pointed_at(parameters, weights)


@contextmanager
def pointed_at(
    parameters: Mapping[str, nn.Parameter], weights: dict[str, Tensor]
) -> Iterator[None]:
    """Run with other weights. Both sets stay in place: only what parameters point at changes.

    Nothing may be backpropagated meanwhile; graphs built before or after are unaffected.
    """
    trained = {name: parameters[name].data for name in weights}
    for name in weights:
        # The weights stay on the parameters' device, so that they move there only once.
        weights[name] = weights[name].to(parameters[name].device)
        parameters[name].data = weights[name]
    try:
        yield
    finally:
        for name, value in trained.items():
            parameters[name].data = value


def refer_to(tuning: Tuning, weights: dict[str, Tensor]) -> None:
    """Make these weights the reference in place of the base alone.

    Raises UserError unless they have the trained parameters' names and shapes.
    """
    check_shapes(tuning.parameters(), shapes_of(weights), remedy=OTHER_SETTINGS)
    tuning.reference = weights
