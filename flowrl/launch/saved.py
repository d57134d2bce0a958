"""The reading of a configuration out of a folder's file, which may be damaged."""

from __future__ import annotations

from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flowrl.launch.moved import move
from flowrl.runs.files import damaged, read_text


def read_saved(path: Path, remedy: str) -> DictConfig:
    """Read the configuration in a file of a run's folder, its targets by their names of today.

    Raises UserError, with the remedy, for a damaged file.
    """
    text = read_text(path, remedy)
    try:
        saved = OmegaConf.create(text)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise damaged(path, error, remedy) from error
    if not isinstance(saved, DictConfig) or not saved:
        raise damaged(path, "it holds no configuration", remedy)
    return OmegaConf.create(move(OmegaConf.to_container(saved, resolve=False)))
