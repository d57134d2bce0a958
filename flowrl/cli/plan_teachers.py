"""The teachers of a distilling loss in plans: their LoRAs, and the pass that a term makes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from flowrl.errors import UserError
from flowrl.launch.teachers import build_teachers, guidance_of, nodes_of
from flowrl.tuning import formats
from flowrl.tuning.frozen_lora import FrozenLoRA
from flowrl.tuning.protocol import Tuning
from flowrl.types import Conditioning

UNNAMED = "???"
"""The LoRA of a teacher that has none yet, as recipes leave it open."""


@dataclass(frozen=True, slots=True)
class PlannedTeacher:
    """A teacher of a plan: its LoRA on the meta device, or None for one that is taken to be like
    the LoRA that is trained; its guidance scale; and the bytes of its LoRA.
    """

    lora: FrozenLoRA | None
    guidance_scale: float
    num_bytes: int


def named(cfg: DictConfig) -> DictConfig:
    """Return the configuration with a name for each teacher's LoRA that has none yet, so that all
    else of it can be checked.
    """
    changed = cfg.copy()
    for name in unnamed(cfg):
        OmegaConf.update(changed, f"teachers.{name}.lora", "later")
    return changed


def unnamed(cfg: DictConfig) -> list[str]:
    """List the teachers that have no LoRA yet."""
    return [name for name, node in nodes_of(cfg).items() if node["lora"] == UNNAMED]


def read_teachers(cfg: DictConfig, transformer: nn.Module) -> dict[str, PlannedTeacher]:
    """Read the LoRAs of teachers that have one for a transformer on the meta device, to which no
    adapter is attached yet.

    Raises UserError for one that is not there or does not fit.
    """
    present = cfg.copy()
    OmegaConf.set_struct(present, False)
    for name in unnamed(cfg):
        del present.teachers[name]
    meta = torch.device("meta")
    planned = {}
    for name, teacher in build_teachers(present, transformer).items():
        num_bytes = teacher.lora.nbytes
        planned[name] = PlannedTeacher(teacher.lora.to(meta), teacher.guidance_scale, num_bytes)
    return planned


def with_unnamed(
    planned: Mapping[str, PlannedTeacher], cfg: DictConfig, tuning: Tuning
) -> dict[str, PlannedTeacher]:
    """Return all teachers, those without a LoRA as if it were the one that is trained. Raises
    UserError where none is trained.
    """
    teachers = dict(planned)
    nodes = nodes_of(cfg)
    for name in unnamed(cfg):
        if tuning.folder_name != formats.FOLDER:
            raise UserError(
                f"teachers.{name}.lora has no value yet, and no LoRA is trained that could stand "
                f"for it; give one: teachers.{name}.lora=FILE"
            )
        num_bytes = sum(value.nbytes for value in tuning.parameters().values())
        teachers[name] = PlannedTeacher(None, guidance_of(cfg, nodes[name]), num_bytes)
    return teachers


def bytes_of(teachers: Mapping[str, PlannedTeacher]) -> int:
    """Return the bytes of all teachers' LoRAs."""
    return sum(teacher.num_bytes for teacher in teachers.values())


def dearest(teachers: Mapping[str, PlannedTeacher]) -> PlannedTeacher | None:
    """Return the teacher whose pass takes most: one with guidance, and of these the largest."""
    return max(
        teachers.values(),
        key=lambda teacher: (teacher.guidance_scale != 1, teacher.num_bytes),
        default=None,
    )


def teach(plan: Any, x: Tensor, embeddings: Conditioning) -> None:
    """Make the pass of a term's teachers, as if all rows were those of the dearest one; none where
    there are no teachers.
    """
    teacher = dearest(plan.teachers)
    if teacher is None:
        return
    with ExitStack() as stack:
        if teacher.lora is not None:
            stack.enter_context(plan.tuning.at_base())
            stack.enter_context(teacher.lora.added())
        plan.look(x, embeddings, teacher.guidance_scale, 0)
