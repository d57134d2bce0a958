"""Composing the configuration: where it stands, the resolvers that its files use, and one way to compose it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from flowrl.bounds import is_folder_name
from flowrl.errors import UserError
from flowrl.runs.files import CONFIG

CONF = Path(__file__).parents[2] / "conf"


def compose(overrides: Sequence[str], *, config: str = "config", folder: Path = CONF) -> DictConfig:
    """The configuration `folder`/`config`.yaml with command-line `overrides`, outside of a Hydra application.

    Raises Hydra's errors for unknown keys and options, which `flowrl.launch.errors.explain` puts into one line.
    """
    register_resolvers()
    with hydra.initialize_config_dir(str(folder.resolve()), version_base="1.3"):
        return hydra.compose(config, overrides=list(overrides))


def register_resolvers() -> None:
    """The resolvers that YAML files use.

    `${run_folder:RESUME,RUN_DIR,NEW}` is the run to resume, the folder asked for, or a new one;
    `${image_tokens:RESOLUTION,PIXELS}` the length of a square image's sequence of tokens of PIXELS a side;
    `${folder_name:NAME}` a name that may be part of a folder's.
    """
    OmegaConf.register_new_resolver("run_folder", _run_folder, replace=True)
    OmegaConf.register_new_resolver("image_tokens", lambda side, pixels: (side // pixels) ** 2, replace=True)
    OmegaConf.register_new_resolver("folder_name", _folder_name, replace=True)


def _folder_name(name: str | float) -> str:
    if not is_folder_name(str(name)):
        raise UserError(f"name={name} must be a name without slashes: it is part of the run's folder")
    return str(name)


def _run_folder(resume: str | None, run_dir: str | None, new: str) -> str:
    resume = resume and str(resume)  # the command line makes a number of some names
    if resume and not (Path(resume) / CONFIG).is_file():
        raise UserError(f"resume={resume}: no {CONFIG} there; give the folder of an earlier run")
    # Resolved, since `outputs/latest` is a link that this very run will move.
    return str(Path(resume).resolve()) if resume else run_dir or new
