"""The configuration that a run starts from: the composed one, or a resumed run's own with overrides
applied.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flowrl.callbacks.trackers import default_tags
from flowrl.errors import UserError
from flowrl.launch import foreign_targets, labels
from flowrl.launch.changes import overridden
from flowrl.launch.composed import freeze, is_composed
from flowrl.launch.foreign_targets import check_config
from flowrl.launch.lora_keys import take_from_file
from flowrl.launch.moved import move
from flowrl.launch.saved import read_saved
from flowrl.launch.search_path import project_folders, search_flags
from flowrl.launch.start import refuse_other_start
from flowrl.launch.teachers import refuse_other_teachers
from flowrl.parallel.strategies import is_later_rank
from flowrl.runs.changes import Change
from flowrl.runs.command_line import resume_command
from flowrl.runs.files import CONFIG, SOURCE, write_whole
from flowrl.runs.folder import claim

log = logging.getLogger(__name__)

RESTORE = (
    f"restore it, or copy {CONFIG} over it: an override then reaches no other key than the one it "
    "names"
)


def configure(cfg: DictConfig) -> tuple[DictConfig, list[Change]]:
    """Return the configuration to run: the composed one, or the resumed run's own with value
    overrides applied, and what they change.

    The folder is this process's from here on. Raises UserError where that holds another run, where
    it cannot be known under torchrun, and for what a resumed run refuses.
    """
    folder = HydraConfig.get().runtime.output_dir
    # One process holds the folder's lock for all of them.
    if not is_later_rank():
        claim(folder)
    if cfg.resume:
        return _resumed(Path(cfg.resume), folder, is_trusted=bool(cfg.get(foreign_targets.KEY)))
    return _new(cfg, folder), []


def _new(cfg: DictConfig, folder: str) -> DictConfig:
    """Return the configuration of a run that begins in `folder`."""
    # The default folder is named by the time, which every one of torchrun's processes reads anew.
    if torch.distributed.is_torchelastic_launched() and not cfg.run_dir:
        raise UserError(
            "run_dir=PATH is needed under torchrun: its processes must write to one folder"
        )
    # A later process may come so late that the first has written the new run's configuration.
    if (Path(folder) / CONFIG).exists() and not is_later_rank():
        raise UserError(
            f"run_dir={folder} holds a run already; choose another, or continue it with: "
            f"{resume_command(folder, flags=search_flags(HydraConfig.get()))}"
        )
    cfg.run_dir = folder
    # A resumed run must not take the choices and the time of the launch that resumes it.
    freeze(cfg)
    hydra = HydraConfig.get()
    if not is_composed(hydra):  # else its sweep has done so, who knows what was typed
        take_from_file(cfg, hydra.overrides.task)
    labels.fill(cfg, hydra)
    cfg.tags = cfg.tags or default_tags(hydra.runtime.choices, cfg.loss.get("delta"))
    return cfg


def _resumed(run: Path, folder: str, *, is_trusted: bool) -> tuple[DictConfig, list[Change]]:
    """Return the configuration of an earlier run with this launch's overrides, and what they
    change.
    """
    hydra = HydraConfig.get()
    saved = read_source(run)
    overrides = OverridesParser.create().parse_overrides(list(hydra.overrides.task))
    typed = {item.key_or_group for item in overrides if not item.is_delete()}
    folders = project_folders(hydra, leaving_out=run)
    # Before anything of it is resolved or built: the folder may be somebody else's.
    check_config(saved, run, is_trusted=is_trusted, conf=folders, typed=typed)
    # A key that the run lacks is then a mistake, unless it is given with `+`.
    OmegaConf.set_struct(saved, True)
    # These two are about the launch, and no keys of the run itself.
    of_launch = ("resume", foreign_targets.KEY)
    task = [str(item.input_line) for item in overrides if item.key_or_group not in of_launch]
    refuse_other_start(task, OmegaConf.select(saved, "lora.start"))
    refuse_other_teachers(task)
    merged = with_overrides(saved, task)
    # A run's folder may have been moved since.
    OmegaConf.update(merged, "run_dir", folder)
    before: Any = read_config(run) or OmegaConf.to_container(saved, resolve=True)
    # Two files keep the configuration; a key may have been deleted from one of them by hand.
    if lacking := _lacking(before, OmegaConf.to_container(merged)):
        others = f" and {len(lacking) - 1} other keys" if len(lacking) > 1 else ""
        raise UserError(
            f"{run / SOURCE} lacks {lacking[0]}{others} of {CONFIG}; {RESTORE}; or give it: "
            f"++{lacking[0]}=VALUE"
        )
    return merged, overridden(before, merged)


def with_overrides(saved: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Return a saved configuration with the command line's values, which are read as Hydra reads
    them.

    `+` and `++` are for keys that the run has and the defaults lack, or the other way round. Raises
    UserError for one that would replace or delete a group of keys, and omegaconf's error for a key
    that the run lacks.
    """
    merged = copy.deepcopy(saved)
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key = override.key_or_group
        is_group = OmegaConf.is_dict(OmegaConf.select(merged, key))
        if override.is_delete() or is_group:
            raise UserError(
                f"{override.input_line}: a resumed run keeps its {key}; only single values can be "
                "overridden"
            )
        may_add = override.is_add() or override.is_force_add()
        OmegaConf.update(merged, key, override.value(), force_add=may_add)
    return merged


def read_source(folder: Path) -> DictConfig:
    """Read the configuration of a run with its interpolations. Raises UserError for a missing or a
    damaged file.
    """
    path = folder / SOURCE
    if not path.is_file():
        raise UserError(f"{path} is missing; {RESTORE}")
    return read_saved(path, RESTORE)


def read_config(folder: Path) -> dict[str, Any] | None:
    """Read the configuration that a run was last run with, plain, its targets by today's names.

    Returns None where its file cannot be read, and says so: the run's other file has the same keys.
    """
    path = folder / CONFIG
    try:
        text = path.read_text(encoding="utf-8")
        config = OmegaConf.to_container(OmegaConf.create(text))
    except (OSError, yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError):
        config = None
    if isinstance(config, dict) and config:
        return {str(key): value for key, value in move(config).items()}
    log.warning("%s is damaged; it is written again from %s", path, SOURCE)
    return None


def _lacking(before: Any, now: Any, prefix: str = "") -> list[str]:
    """List the keys of a resolved container that one with interpolations does not have."""
    # What stands below an interpolation is not known before it is resolved.
    is_interpolation = isinstance(now, str) and "${" in now
    if not isinstance(before, dict) or is_interpolation:
        return []
    lacking = []
    for key, value in before.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if not isinstance(now, dict) or key not in now:
            lacking.append(name)
        else:
            lacking += _lacking(value, now[key], name)
    return lacking


def write_config(cfg: DictConfig, folder: Path) -> None:
    """Write the configuration as it is, then resolved: by the second a run's folder is known."""
    # The first keeps the interpolations, so that an override on resumption reaches what follows
    # from its key.
    for name, is_resolved in ((SOURCE, False), (CONFIG, True)):
        text = OmegaConf.to_yaml(cfg, resolve=is_resolved)
        write_whole(folder / name, text)
