"""A scheduler that stands in for a pipeline's own: it gives the loop the times that were asked for,
and carries the first step's prediction out of it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from flowrl.models.derived.leaving import Ended, Refused


class Stepped(Ended):
    """Leaves it at the first step, with what the scheduler was handed there."""

    def __init__(self, output: Tensor, sample: Tensor) -> None:
        super().__init__()
        self.output = output
        self.sample = sample


@dataclass(frozen=True)
class Step:
    """One step of a stock sampling: the prediction, and the states before and after it."""

    output: Tensor
    before: Tensor
    after: Tensor


class Euler(FlowMatchEulerDiscreteScheduler):
    """The scheduler of rectified flows as it is, but that it cannot be copied: a pipeline that
    copies its scheduler steps two states at once. Raises UserError where one does.
    """

    sigmas: Tensor
    timesteps: Tensor

    def __deepcopy__(self, memo: Mapping[int, Any]) -> NoReturn:
        raise Refused("it copies its scheduler, so it steps two states at once")

    def scale_model_input(self, sample: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return the state as it is, as rectified flows scale none; some pipelines ask."""
        return sample


class StandIn(Euler):
    """Gives the loop the times of `ask`, whatever the pipeline sets, and ends it at its first step.

    The tables that pipelines read, `sigmas` and `timesteps`, hold what was asked for. The signature
    of `set_timesteps` is the usual one, since pipelines look for its parameters by name.
    """

    asked: tuple[Sequence[float], Tensor] = ((), torch.empty(0))

    def ask(self, sigmas: Sequence[float], timesteps: Tensor) -> None:
        """Set the sigmas and timesteps of the next calls, in pairs; none make a call that only
        decodes.
        """
        self.asked = (sigmas, timesteps)

    def set_timesteps(
        self,
        num_inference_steps: Any = None,
        device: Any = None,
        sigmas: Any = None,
        mu: Any = None,
        timesteps: Any = None,
    ) -> None:
        """Install the times that were asked for."""
        values, times = self.asked
        # Calls compare their times, which have no numbers on the meta device.
        is_planned = device is not None and torch.device(device).type == "meta"
        place = "cpu" if is_planned else device
        self.timesteps = times.to(place)
        # As in the scheduler proper, one value more than there are timesteps.
        self.sigmas = torch.tensor([*values, 0.0], dtype=torch.float32, device=place)
        self.num_inference_steps = len(values)

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *_: Any, **__: Any) -> Any:
        """End the call, and carry prediction and state out of it."""
        raise Stepped(model_output, sample)


class Witness(Euler):
    """The scheduler of a stock sampling, which notes what each step is handed and gives."""

    def watch(self, last: Tensor | None = None) -> list[Step]:
        """Return the list that steps are added to from now on; the last one begins at the state
        `last`, where that is given.
        """
        self.steps: list[Step] = []
        self.last = last
        return self.steps

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *a: Any, **k: Any) -> Any:
        """Step as usual. Copies are noted, since pipelines may write into a state."""
        output = model_output.clone()
        before = sample.clone()
        result = super().step(model_output, timestep, sample, *a, **k)  # type: ignore[misc]
        # A tuple, or an output of diffusers, whose first value is read by the same index.
        self.steps.append(Step(output, before, result[0].clone()))
        if self.last is not None and len(self.steps) == len(self.timesteps) - 1:
            state = self.last.to(result[0])
            return (state,) if isinstance(result, tuple) else type(result)(prev_sample=state)
        return result


def flow_settings(scheduler: Any) -> dict[str, Any]:
    """Return the settings of the Euler scheduler that goes the stock scheduler's grid.

    Another solver of rectified flows is exchanged, with its shift, since FlowRL has solvers of its
    own. Raises Refused for a scheduler of another kind of model.
    """
    if scheduler is None:
        raise Refused("it has no scheduler")
    settings = dict(scheduler.config)
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        # FlowRL's samplers draw the noise, if any.
        return {**settings, "stochastic_sampling": False}
    name = type(scheduler).__name__
    is_flow = settings.get("use_flow_sigmas") or "FlowMatch" in name
    if not is_flow or settings.get("prediction_type", "flow_prediction") != "flow_prediction":
        raise Refused(f"its {name} is no scheduler of a rectified flow")
    shift = settings.get("flow_shift") or settings.get("shift") or 1.0
    return {"shift": shift, "num_train_timesteps": settings.get("num_train_timesteps", 1000)}


def exchanged(kind: type[Euler], settings: Mapping[str, Any]) -> Any:
    """Make a scheduler with these settings, as `flow_settings` gives them."""
    return kind.from_config(copy.copy(dict(settings)))
