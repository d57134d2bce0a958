"""An exponential moving average of the trained weights, which evaluation and export use."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flowrl.values.bounds import BelowOne, Count
from flowrl.values.check import checked


class EMA:
    """The average takes in the weights every `every` optimizer steps.

    It becomes d average + (1 - d) weights, with d = min(decay, (1 + s) / (10 + s)), so that early
    averages follow the weights instead of the untrained start. s is the number of the optimizer
    step, from 0 on, whatever `every` is: d is 0.1 after the first step, and 0.9 from the 81st on.

    flow_grpo's code does the same, with two differences: its counter is one higher, since it is
    read after the step, and it averages again at each accumulated batch until the next step.
    """

    @checked("ema")
    def __init__(self, *, decay: BelowOne, every: Count) -> None:
        self.decay = decay
        self.every = every
        self.weights: dict[str, Tensor] = {}

    def start(self, parameters: Mapping[str, Tensor]) -> None:
        """Begin from the given weights."""
        self.weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def to(self, device: torch.device) -> None:
        """Move the average to a device."""
        self.weights = {name: value.to(device) for name, value in self.weights.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor], num_optimizer_steps: int) -> None:
        """Take in the weights after optimizer step number `num_optimizer_steps`, counted from 1."""
        if num_optimizer_steps % self.every:
            return
        # (1 + s) / (10 + s), with the s of the docstring one less than the number counted from 1.
        decay = min(self.decay, num_optimizer_steps / (num_optimizer_steps + 9))
        for name, average in self.weights.items():
            # In place: checkpoints and evaluations hold these very tensors.
            average.lerp_(parameters[name].detach(), 1 - decay)
