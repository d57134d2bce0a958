"""The composing of the configuration: where it stands, the resolvers that its files use, and one
way to compose it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from flowrl.errors import UserError
from flowrl.runs.command_line import called
from flowrl.runs.files import CONFIG
from flowrl.runs.folder import make_new
from flowrl.runs.installation import CONF
from flowrl.values.bounds import FolderName
from flowrl.values.check import check_value
from flowrl.values.sizes import height_and_width


def compose(
    overrides: Sequence[str],
    *,
    config: str = "config",
    folder: Path = CONF,
    with_hydra: bool = False,
) -> DictConfig:
    """Compose the configuration `folder`/`config`.yaml with command-line `overrides`, outside of a
    Hydra application; its key `hydra` has Hydra's own part `with_hydra`.

    Raises Hydra's errors for unknown keys and options, which `flowrl.launch.errors.explain` puts
    into one line.
    """
    register_resolvers()
    with hydra.initialize_config_dir(str(folder.resolve()), version_base="1.3"):
        return hydra.compose(config, overrides=list(overrides), return_hydra_config=with_hydra)


def register_resolvers() -> None:
    """Register the resolvers that YAML files use.

    `${run_folder:RESUME,RUN_DIR,NEW}` is the run to resume, the folder asked for, or a new one,
    which is made; `${image_tokens:RESOLUTION,PIXELS}` the length of an image's sequence of tokens
    of PIXELS a side; `${folder_name:NAME}` a name that may be part of a folder's;
    `${called:}` the call of this program, as a shell takes it.
    """
    OmegaConf.register_new_resolver("run_folder", _run_folder, replace=True)
    OmegaConf.register_new_resolver("image_tokens", _image_tokens, replace=True)
    OmegaConf.register_new_resolver("folder_name", _folder_name, replace=True)
    OmegaConf.register_new_resolver("called", called, replace=True)


def _image_tokens(resolution: int | Sequence[int], pixels: int) -> int:
    return math.prod(side // pixels for side in height_and_width(resolution))


def _folder_name(name: str | float) -> str:
    check_value("name", str(name), FolderName)
    return str(name)


def _run_folder(resume: str | None, run_dir: str | None, new: str) -> str:
    resume = resume and str(resume)  # the command line makes a number of some names
    if resume and not (Path(resume) / CONFIG).is_file():
        raise UserError(f"resume={resume}: no {CONFIG} there; give the folder of an earlier run")
    if resume:
        # Resolved, since `outputs/latest` is a link that this very run will move.
        folder = str(Path(resume).resolve())
    elif run_dir or "TORCHELASTIC_RUN_ID" in os.environ:
        # Whose processes would each make one; refused later.
        folder = run_dir or new
    else:
        check_folder("run_dir", new)
        folder = make_new(new)
    check_folder("run_dir", folder)
    return folder


def check_folder(key: str, folder: str) -> None:
    """Raise UserError where Hydra would take a piece of the folder's path for an interpolation."""
    path = os.path.abspath(folder)
    if "${" in path:
        raise UserError(
            f"{key}={path}: Hydra cannot write to a folder whose path holds '${{'; choose another"
        )
