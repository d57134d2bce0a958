"""Beginning from a LoRA: `lora.start` is looked at before weights load, and each run keeps a copy
of it.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from flowrl.errors import UserError
from flowrl.models import loading
from flowrl.tuning import formats
from flowrl.tuning.writer import write

KEYS = ("rank", "alpha", "targets")
"""Of `lora`, what a LoRA file says itself."""


def take_from_file(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """With `lora.start`, leave to its file what the command line does not say, and make its path
    absolute.

    The model's rank, alpha and layers are those of a fresh adapter; written into the run's
    configuration, they would say what is not so. Those of the command line stay and must be the
    file's.
    """
    if not cfg.lora.get("start"):
        return
    typed = {item.lstrip("+").partition("=")[0] for item in overrides}
    for key in KEYS:
        if f"lora.{key}" not in typed:
            cfg.lora[key] = None
    cfg.lora.start = str(Path(cfg.lora.start).expanduser().resolve())


def check_start(cfg: DictConfig, recipe: Any) -> None:
    """Read the LoRA that is started from and compare it with the base's architecture, before
    weights load.
    """
    start = cfg.lora.get("start")
    if not start:
        return
    if cfg.tuning.get("start") != start:
        raise UserError(
            f"lora.start={start} is for tuning=lora; to train all weights from there, fuse the "
            "LoRA into the base "
            "(pipe.fuse_lora, pipe.unload_lora_weights, pipe.save_pretrained) and give that as "
            "model.pretrained"
        )
    given = recipe.read_start()
    transformer = loading.transformer_on_meta(cfg.model.pretrained)
    if transformer is not None:
        formats.check(given, transformer, Path(start))
        recipe.check_targets(given, transformer)


def with_copy(cfg: DictConfig, folder: Path) -> DictConfig:
    """The configuration of a run in `folder`, beginning from the run's copy of the LoRA where there
    is one.

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
    shutil.rmtree(partial, ignore_errors=True)
    given = formats.read(Path(cfg.lora.start))
    write(given, partial, "comfy")
    partial.rename(target)
    print(
        f"beginning from {cfg.lora.start}: {given.describe()}; the reference is "
        f"lora.reference={cfg.lora.reference}"
    )


def refuse_other_start(overrides: Sequence[str], start: str | None) -> None:
    """Raise UserError where a resumed run, which began from the LoRA at `start`, is told to begin
    from another one.
    """
    for item in overrides:
        key, _, value = item.lstrip("+").partition("=")
        if key == "lora.start" and value != start:
            raise UserError(
                f"{item}: a resumed run keeps the LoRA that it began from; start a new run"
            )
