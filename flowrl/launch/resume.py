"""The configuration that a run starts from: the composed one, or a resumed run's own with overrides applied."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flowrl.errors import UserError
from flowrl.launch.changes import overridden
from flowrl.modules.parallel import is_later_rank
from flowrl.runs.files import CONFIG, SOURCE, read_text, write_whole
from flowrl.runs.folder import claim
from flowrl.trackers import default_tags

log = logging.getLogger(__name__)

RESTORE = f"restore it, or copy {CONFIG} over it: an override then reaches no other key than the one it names"


def configure(cfg: DictConfig) -> DictConfig:
    """The configuration to run: the given one, or the resumed run's own with value overrides applied."""
    folder = HydraConfig.get().runtime.output_dir
    if not is_later_rank():
        claim(folder)
    if not cfg.resume:
        if torch.distributed.is_torchelastic_launched() and not cfg.run_dir:
            raise UserError("run_dir=PATH is needed under torchrun: its processes must write to one folder")
        if (Path(folder) / CONFIG).exists() and not is_later_rank():
            raise UserError(
                f"run_dir={folder} holds a run already; choose another, or continue it with resume={folder}"
            )
        cfg.run_dir, cfg.name = folder, str(cfg.name)
        cfg.tags = cfg.tags or default_tags(HydraConfig.get().runtime.choices, cfg.loss.get("delta"))
        return cfg
    return _resumed(Path(cfg.resume), folder)


def _resumed(run: Path, folder: str) -> DictConfig:
    saved = read_source(run)
    OmegaConf.set_struct(saved, True)
    task = [item for item in HydraConfig.get().overrides.task if not item.startswith("resume=")]
    overrides = [item.lstrip("+") for item in task]
    for item in overrides:
        key = item.split("=", 1)[0]
        if OmegaConf.is_dict(OmegaConf.select(saved, key)):
            raise UserError(f"{item}: a resumed run keeps its {key}; only single values can be overridden")
    known = [item for item in task if not item.startswith("+")]
    merged = OmegaConf.merge(saved, OmegaConf.from_dotlist(known), {"run_dir": folder})
    # `++` is for keys that the run has and the defaults lack, or the other way round.
    OmegaConf.set_struct(merged, False)
    merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([item for item in overrides if item not in known]))
    assert isinstance(merged, DictConfig)
    OmegaConf.set_struct(merged, True)  # a key it lacks is an error, not None
    before: Any = read_config(run) or OmegaConf.to_container(saved, resolve=True)
    if lacking := _lacking(before, OmegaConf.to_container(merged)):
        others = f" and {len(lacking) - 1} other keys" if len(lacking) > 1 else ""
        raise UserError(
            f"{run / SOURCE} lacks {lacking[0]}{others} of {CONFIG}; {RESTORE}; or give it: ++{lacking[0]}=VALUE"
        )
    if not is_later_rank():
        for text in overridden(before, merged):
            print(text)
    return merged


def read_source(folder: Path, name: str = SOURCE) -> DictConfig:
    """The configuration of a run with its interpolations. Raises UserError for a missing or a damaged file."""
    path = folder / name
    if not path.is_file():
        raise UserError(f"{path} is missing; {RESTORE}")
    try:
        saved = OmegaConf.create(read_text(path, RESTORE))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())}); {RESTORE}") from error
    if not isinstance(saved, DictConfig) or not saved:
        raise UserError(f"{path} is damaged (it holds no configuration); {RESTORE}")
    return saved


def read_config(folder: Path) -> dict[str, Any] | None:
    """The configuration that a run was last run with, plain; None where its file cannot be read, which is told."""
    path = folder / CONFIG
    try:
        config = OmegaConf.to_container(OmegaConf.create(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError):
        config = None
    if isinstance(config, dict) and config:
        return {str(key): value for key, value in config.items()}
    log.warning("%s is damaged; it is written again from %s", path, SOURCE)
    return None


def _lacking(before: Any, now: Any, prefix: str = "") -> list[str]:
    """The keys of a resolved container that one with interpolations does not have."""
    if not isinstance(before, dict) or (isinstance(now, str) and "${" in now):
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
    for name, is_resolved in ((SOURCE, False), (CONFIG, True)):
        write_whole(folder / name, OmegaConf.to_yaml(cfg, resolve=is_resolved))
