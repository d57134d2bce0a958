"""The distance of a step from the teachers' steps, which a distilling loss lessens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flowrl.gaussian import GaussianStep
from flowrl.noise import on_device
from flowrl.objectives.micro_batch import MicroBatch
from flowrl.objectives.protocol import Context


@dataclass(frozen=True, slots=True)
class Lesson:
    """The KL of N samples of a term to their teachers' steps, under the configured reduction, with
    its gradient; and the mean KL to each teacher with the number of samples behind it.
    """

    kl: Float[Tensor, "N"]
    metrics: dict[str, Float[Tensor, ""]]
    counts: dict[str, int]


def lesson_of(
    context: Context, batch: MicroBatch, step: GaussianStep, index: int, places: Sequence[int]
) -> Lesson | None:
    """Compare the micro-batch's `index`-th trained step, which is `step` under the current policy,
    with the teachers' for the samples at `places`; None where the loss needs no teachers.

    The teachers are evaluated at the rollout's own states, so that both means differ by the
    policies alone.
    """
    teachers = context.teachers
    if teachers is None:
        return None
    algorithm = context.algorithm
    teacher_mean = teachers.mean(batch, places, index, algorithm.intervals, algorithm.sampler)
    if len(places) < len(batch.rows):
        rows = on_device(torch.tensor(places, dtype=torch.long), step.mean.device)
        step = GaussianStep(step.mean.index_select(0, rows), step.std)
    kl = algorithm.likelihood.kl(step, teacher_mean)
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row, place in enumerate(places):
        rows_of[f"teacher/kl/{teachers.name_for(batch.prompts[place])}"].append(row)
    metrics = {}
    for name, rows_of_teacher in rows_of.items():
        chosen = on_device(torch.tensor(rows_of_teacher), kl.device)
        metrics[name] = kl.detach().index_select(0, chosen).mean()
    counts = {name: len(rows_of_teacher) for name, rows_of_teacher in rows_of.items()}
    return Lesson(kl, metrics, counts)
