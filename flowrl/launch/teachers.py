"""The teachers of a run: they are compared with the loss, the prompts and the base model before
weights load, each run keeps copies of them, and they are built.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from torch import nn

from flowrl.errors import UserError
from flowrl.launch.checks import divides_weights
from flowrl.losses.protocol import Loss
from flowrl.models.outline import outline
from flowrl.models.protocol import FlowModel
from flowrl.runs.files import TEACHERS
from flowrl.training.teachers import Families, Teacher, TeacherModule, teacher_of
from flowrl.tuning import formats
from flowrl.tuning.frozen_lora import FrozenLoRA
from flowrl.tuning.protocol import Tuning
from flowrl.tuning.writer import write
from flowrl.types import Prompt
from flowrl.values.plural import counted

SHAPE = "teachers={NAME: {lora: FILE, families: [FAMILY, ...]}}"
"""The key of the teachers with its form, for messages."""


def check_teachers(cfg: DictConfig, loss: Loss, prompts: Sequence[Prompt]) -> None:
    """Compare the teachers with the loss, the prompts to train on and the base model, before
    weights load.

    Raises UserError, in one line, where one of the two is there without the other, for prompts that
    no teacher or two are for, for a teacher of no prompt, and for a file that is no LoRA of the
    base.
    """
    nodes = nodes_of(cfg)
    if loss.needs_teachers and not nodes:
        raise UserError(
            f"loss={loss.name} needs teachers: give {SHAPE}, where families=null is all families "
            "that no other teacher names"
        )
    if not nodes:
        return
    if not loss.needs_teachers:
        raise UserError(
            f"teachers={list(nodes)} are given, of which loss={loss.name} would learn nothing; set "
            "loss=opd, or teachers=null"
        )
    _check_method(cfg, loss)
    for name in nodes:
        if not re.fullmatch(r"[\w-]+", name):
            raise UserError(
                f"teachers.{name}: a teacher's name is one of letters, digits, - and _, since it "
                "names metrics and a folder"
            )
    _check_guidance(cfg, nodes)
    _check_families(families_of(nodes), prompts)
    transformer = outline(cfg.model)
    for node in nodes.values():
        path = Path(node["lora"])
        lora_file = formats.read(path)
        if transformer is not None:
            formats.check(lora_file, transformer, path)


def _check_method(cfg: DictConfig, loss: Loss) -> None:
    """Raise UserError for options that teachers do not go with, or that have no use beside them."""
    if cfg.backend.compile:
        raise UserError(
            f"loss={loss.name} does not go with backend.compile=true, whose layers would not "
            "notice a teacher's LoRA; set it to false"
        )
    if divides_weights(cfg):
        raise UserError(
            f"loss={loss.name} is not tested with trainer=fsdp, whose layers are gathered for each "
            "pass; take trainer=ddp"
        )
    if cfg.rollout.get("credit") == "step":
        raise UserError(
            f"rollout.credit=step scores unfinished samples for advantages, which loss={loss.name} "
            "does not look at: set rollout.credit=trajectory"
        )


def nodes_of(cfg: DictConfig) -> dict[str, dict[str, Any]]:
    """Return the settings of each teacher by its name; none where there are no teachers, as in runs
    of earlier versions.
    """
    node = cfg.get("teachers")
    if node is None:
        return {}
    plain: Any = OmegaConf.to_container(node, resolve=True)
    return {str(name): settings for name, settings in plain.items()}


def families_of(nodes: Mapping[str, Mapping[str, Any]]) -> Families:
    """Return the families that each teacher is for, None for one of all others."""
    return {name: node.get("families") for name, node in nodes.items()}


def _check_guidance(cfg: DictConfig, nodes: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise UserError for a teacher with guidance where the model encodes no negative prompt."""
    for name, node in nodes.items():
        scale = node.get("guidance_scale")
        if scale not in (None, 1) and not cfg.model.has_guidance:
            raise UserError(
                f"teachers.{name}.guidance_scale={scale} needs model.has_guidance=true; 1.0 means "
                "no guidance, and null is rollout.guidance_scale"
            )


def _check_families(families: Families, prompts: Sequence[Prompt]) -> None:
    """Raise UserError unless each prompt has exactly one teacher, and each family a prompt."""
    others = [name for name, own in families.items() if own is None]
    if len(others) > 1:
        raise UserError(
            f"teachers.{others[1]}.families=null and teachers.{others[0]}.families=null: one "
            "teacher alone may be for all other families; name those of the other"
        )
    named = [(family, name) for name, own in families.items() for family in own or ()]
    first: dict[str, str] = {}
    for family, name in named:
        if family in first:
            raise UserError(_named_again(family, name, first[family]))
        first[family] = name
    # Plans and evaluations draw no prompt.
    if prompts:
        _check_prompts(families, first, prompts)


def _named_again(family: str, name: str, first: str) -> str:
    """Say that a teacher names a family which this one, or another, has named first."""
    if name == first:
        return f"teachers.{name}.families names {family!r} twice; once is enough"
    return (
        f"teachers.{name}.families names {family!r}, as does teachers.{first}.families; a prompt "
        "has one teacher"
    )


def _check_prompts(families: Families, named: Mapping[str, str], prompts: Sequence[Prompt]) -> None:
    """Raise UserError for a family of the prompts without a teacher, a family that no prompt has,
    and a teacher of all other families where there are none.
    """
    counts = Counter(prompt.family for prompt in prompts)
    known = ", ".join(repr(family) for family in sorted(counts))
    for prompt in prompts:
        _check_prompt(families, prompt, counts[prompt.family])
    for family, name in named.items():
        if family not in counts:
            raise UserError(
                f"teachers.{name}.families names {family!r}, which no prompt of data has; their "
                f"families are {known}"
            )
    idle = set(families) - {teacher_of(families, family) for family in counts}
    if idle:
        raise UserError(
            f"teachers.{min(idle)}.families=null is for no prompt of data: other teachers name "
            f"all of its families, {known}; leave it out"
        )


def _check_prompt(families: Families, prompt: Prompt, count: int) -> None:
    """Raise UserError where none of the teachers is for a prompt, of whose family are so many."""
    if teacher_of(families, prompt.family) is None:
        raise UserError(
            f"teachers: none is for family {prompt.family!r} of {counted(count, 'prompt')} of "
            f"data, such as {prompt.text!r}; add it to a teacher's families, or let one teacher "
            "have families=null, which is all others"
        )


def build_teachers(cfg: DictConfig, transformer: nn.Module) -> dict[str, Teacher]:
    """Read the teachers' LoRAs for a transformer to which no adapter is attached yet.

    Raises UserError for one that does not fit.
    """
    teachers = {}
    for name, node in nodes_of(cfg).items():
        path = Path(node["lora"])
        lora = FrozenLoRA(formats.read(path), transformer, path)
        teachers[name] = Teacher(lora, guidance_of(cfg, node))
    return teachers


def guidance_of(cfg: DictConfig, node: Mapping[str, Any]) -> float:
    """Return the guidance scale that a teacher with these settings is evaluated at."""
    scale = node.get("guidance_scale")
    return float(cfg.rollout.guidance_scale if scale is None else scale)


def teacher_module(
    cfg: DictConfig, teachers: Mapping[str, Teacher], model: FlowModel, tuning: Tuning
) -> TeacherModule | None:
    """Return what evaluates the teachers on the model; None where there are none."""
    if not teachers:
        return None
    families = families_of(nodes_of(cfg))
    return TeacherModule(model=model, tuning=tuning, teachers=teachers, families=families)


def with_copies(cfg: DictConfig, folder: Path) -> DictConfig:
    """Return the configuration of a run in `folder`, which takes the run's copies of its teachers
    where there are some.

    A teacher's file may be gone by the time the run is resumed, or be another LoRA.
    """
    copies = {name: folder / TEACHERS / name for name in nodes_of(cfg)}
    kept = {name: copy for name, copy in copies.items() if copy.is_dir()}
    if not kept:
        return cfg
    changed = cfg.copy()
    for name, copy in kept.items():
        changed.teachers[name].lora = str(copy)
    return changed


def keep_copies(cfg: DictConfig, folder: Path) -> None:
    """Write the teachers of a run into its folder, each whole or not at all; kept where they are
    there. Say in one line each which teacher is for which prompts.
    """
    for name, node in nodes_of(cfg).items():
        target = folder / TEACHERS / name
        if target.is_dir():
            continue
        partial = target.with_name(f"{name}.partial")
        # It may be what a kill left behind.
        shutil.rmtree(partial, ignore_errors=True)
        lora_file = formats.read(Path(node["lora"]))
        write(lora_file, partial, "comfy")
        partial.rename(target)
        own = node.get("families")
        served = "all other families" if own is None else ", ".join(own)
        print(f"teacher {name} for {served}: {node['lora']}, {lora_file.describe()}")


def refuse_other_teachers(overrides: Sequence[str]) -> None:
    """Raise UserError where a resumed run is told to take another teacher's LoRA."""
    for item in OverridesParser.create().parse_overrides(list(overrides)):
        key = item.key_or_group
        if key.startswith("teachers.") and key.endswith(".lora"):
            raise UserError(
                f"{item.input_line}: a resumed run keeps the teachers that it began with; start a "
                "new run"
            )
