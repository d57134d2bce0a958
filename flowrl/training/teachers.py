"""The frozen teachers of on-policy distillation: the base model with a LoRA each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flowrl.models.protocol import FlowModel
from flowrl.noise import on_device
from flowrl.objectives.micro_batch import ConditionedRows, MicroBatch
from flowrl.parallel.sharding import is_divided
from flowrl.samplers.protocol import Sampler
from flowrl.schedule import Interval
from flowrl.tuning.frozen_lora import FrozenLoRA
from flowrl.tuning.protocol import Tuning
from flowrl.types import Conditioning, Prompt

Families = Mapping[str, Sequence[str] | None]
"""The task families that each teacher is for, by its name; None is all that no other names."""


def teacher_of(families: Families, family: str) -> str | None:
    """Return the name of the teacher of a family's prompts, None where there is none."""
    for name, own in families.items():
        if own is not None and family in own:
            return name
    for name, own in families.items():
        if own is None:
            return name
    return None


@dataclass(frozen=True, slots=True)
class Teacher:
    """One teacher: its LoRA, and the guidance scale that it is evaluated at."""

    lora: FrozenLoRA
    guidance_scale: float


class TeacherModule:
    """The teachers of a run, evaluated without gradients on the policy's own network.

    A teacher is the base model, as it was before anything was trained, with the teacher's LoRA.
    """

    def __init__(
        self,
        *,
        model: FlowModel,
        tuning: Tuning,
        teachers: Mapping[str, Teacher],
        families: Families,
    ) -> None:
        self.model = model
        self.tuning = tuning
        self.teachers = teachers
        self.families = families

    def name_for(self, prompt: Prompt) -> str:
        """Return the name of a prompt's teacher; the launch has seen that there is one."""
        name = teacher_of(self.families, prompt.family)
        assert name is not None
        return name

    def mean(
        self,
        batch: MicroBatch,
        places: Sequence[int],
        index: int,
        intervals: Sequence[Interval],
        sampler: Sampler,
    ) -> Float[Tensor, "N *X"]:
        """Evaluate the means of the trajectory's `index`-th step for the N samples at `places`,
        each by the teacher of its prompt; a teacher without samples here makes no pass, unless
        processes wait for each other in each.
        """
        trajectory = batch.trajectory
        x = trajectory.at("x", index).contiguous()
        interval = intervals[trajectory.steps[index]]
        is_shared = trajectory.shares_start and index == 0
        rows_of = self._rows_by_teacher(batch, places)
        makes_all_passes = is_divided(self.model.transformer)
        means: list[Tensor] = []
        order: list[int] = []
        for name in self.teachers:
            rows = rows_of[name]
            if not rows and not makes_all_passes:
                continue
            # A pass for nothing takes the first sample.
            asked = [places[row] for row in rows] or [0]
            states, conditioned = _rows_of(x, batch.conditioned, asked)
            velocity = self._velocity(name, states, interval.sigma, is_shared, conditioned)
            if rows:
                means.append(sampler.step(states, velocity, interval).mean)
                order += rows
        return _back_in_order(means, order) if means else x[:0]

    def _rows_by_teacher(self, batch: MicroBatch, places: Sequence[int]) -> dict[str, list[int]]:
        """List, for each teacher, which of the samples at `places` are its own."""
        rows_of: dict[str, list[int]] = {name: [] for name in self.teachers}
        for row, place in enumerate(places):
            rows_of[self.name_for(batch.prompts[place])].append(row)
        return rows_of

    @torch.no_grad()
    def _velocity(
        self,
        name: str,
        x: Float[Tensor, "N *X"],
        sigma: float,
        is_shared: bool,
        conditioned: ConditionedRows,
    ) -> Float[Tensor, "N *X"]:
        """Evaluate a teacher's velocity at states x of one sigma."""
        teacher = self.teachers[name]

        def velocity(x: Tensor, sigma: float, conditioning: Conditioning) -> Tensor:
            return self.model.velocity(x, sigma, conditioning, teacher.guidance_scale)

        with self.tuning.at_base(), teacher.lora.added():
            return conditioned.field(velocity)(x, sigma, is_shared)

    @property
    def nbytes(self) -> int:
        """The bytes of all teachers' weights."""
        return sum(teacher.lora.nbytes for teacher in self.teachers.values())

    def to(self, device: torch.device) -> TeacherModule:
        """Move all teachers' weights to a device, in place."""
        for teacher in self.teachers.values():
            teacher.lora.to(device)
        return self


def _back_in_order(means: Sequence[Float[Tensor, "_ *X"]], order: Sequence[int]) -> Tensor:
    """Join what teachers gave, sample `order[i]` in the i-th row, in the order of samples."""
    if len(means) == 1:
        return means[0]
    back = on_device(torch.tensor(order).argsort(), means[0].device)
    return torch.cat(list(means)).index_select(0, back)


def _rows_of(
    x: Float[Tensor, "B *X"], conditioned: ConditionedRows, places: Sequence[int]
) -> tuple[Float[Tensor, "N *X"], ConditionedRows]:
    """Return states and conditioning of the samples at `places`: what is there where these are all,
    so that a teacher is evaluated in the batch shape of the policy.
    """
    if list(places) == list(range(len(x))):
        return x, conditioned
    rows = on_device(torch.tensor(places), x.device)
    return x.index_select(0, rows), conditioned.of_rows(places)
