"""The beginning from a LoRA: `lora.start` is looked at before weights load, and each run keeps a
copy of it.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from flowrl.errors import UserError
from flowrl.launch.lora_keys import absolute
from flowrl.models.outline import outline
from flowrl.tuning import formats
from flowrl.tuning.writer import write


def check_start(cfg: DictConfig, recipe: Any) -> None:
    """Read the LoRA that is started from and compare it with the base's architecture, before
    weights load.

    Raises UserError for a file that is no LoRA, for one of another architecture, and under
    tuning=full.
    """
    start = cfg.lora.get("start")
    if not start:
        return
    if cfg.tuning.get("start") != start:
        raise UserError(
            f"lora.start={start} is for tuning=lora; to train all weights from there, fuse the "
            "LoRA into the base (pipe.fuse_lora, pipe.unload_lora_weights, pipe.save_pretrained) "
            "and give that as model.pretrained"
        )
    lora_file = recipe.read_start()
    transformer = outline(cfg.model)
    if transformer is not None:
        formats.check(lora_file, transformer, Path(start))
        recipe.check_targets(lora_file, transformer)


def with_copy(cfg: DictConfig, folder: Path) -> DictConfig:
    """Return the configuration of a run in `folder`, which begins from the run's copy of the LoRA
    where there is one.

    What the run began from may be gone by the time it is resumed or evaluated, or be another LoRA.
    """
    copy = folder / formats.START
    if not (cfg.lora.get("start") and copy.is_dir()):
        return cfg
    changed = cfg.copy()
    changed.lora.start = str(copy)
    return changed


def keep_copy(cfg: DictConfig, folder: Path) -> None:
    """Write the LoRA that a run begins from into its folder, whole or not at all; kept where it is
    there.
    """
    target = folder / formats.START
    if not cfg.lora.get("start") or target.is_dir():
        return
    partial = target.with_suffix(".partial")
    # It may be what a kill left behind.
    shutil.rmtree(partial, ignore_errors=True)
    lora_file = formats.read(Path(cfg.lora.start))
    write(lora_file, partial, "comfy")
    partial.rename(target)
    print(
        f"beginning from {cfg.lora.start}: {lora_file.describe()}; the reference is "
        f"lora.reference={cfg.lora.reference}"
    )


def refuse_other_start(overrides: Sequence[str], start: str | None) -> None:
    """Raise UserError where a resumed run, which began from the LoRA at `start` or with None from a
    fresh one, is told to begin from another one.
    """
    kept = None if start is None else absolute(start)
    for item in OverridesParser.create().parse_overrides(list(overrides)):
        if item.key_or_group != "lora.start":
            continue
        given = None if item.is_delete() else item.value()
        if (None if given is None else absolute(str(given))) != kept:
            raise UserError(
                f"{item.input_line}: a resumed run keeps the LoRA that it began from; start a new "
                "run"
            )
