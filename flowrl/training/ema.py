"""An exponential moving average of the LoRA weights only: what evaluation and export use."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flowrl.errors import UserError
from flowrl.values.bounds import BelowOne, Count


class EMA:
    """Every `every` optimizer steps, average <- d average + (1 - d) weights, with d = min(decay, n
    / (n + 9)).

    n counts the averaging steps, so that early averages follow the weights instead of the untrained
    start.
    """

    def __init__(self, *, decay: BelowOne, every: Count) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"ema.decay={decay} must be in [0, 1)")
        if every < 1:
            raise UserError(f"ema.every={every} must be at least 1")
        self.decay = decay
        self.every = every
        self.weights: dict[str, Tensor] = {}

    def start(self, parameters: Mapping[str, Tensor]) -> None:
        """Begin from the given weights."""
        self.weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor], num_optimizer_steps: int) -> None:
        """Take in the weights after optimizer step number `num_optimizer_steps`, counted from 1."""
        if num_optimizer_steps % self.every:
            return
        count = num_optimizer_steps // self.every
        decay = min(self.decay, count / (count + 9))
        for name, average in self.weights.items():
            average.lerp_(parameters[name].detach(), 1 - decay)
