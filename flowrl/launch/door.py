"""The first look at a new run's configuration, which leaves no folder behind where it refuses."""

from __future__ import annotations

import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from flowrl.errors import UserError
from flowrl.launch.errors import one_line_errors
from flowrl.launch.validate import validate
from flowrl.runs.files import LOG
from flowrl.runs.folder import claim, discard_if_empty


def enter(cfg: DictConfig) -> float | None:
    """Run a configuration that is admitted; a job of a search returns its objective."""
    admit(cfg)
    from flowrl.launch.run import run_job  # with PyTorch

    return run_job(cfg)


def admit(cfg: DictConfig) -> None:
    """End the process, with one line, for a configuration that cannot be run; nothing heavy is
    loaded before.

    A resumed run is looked at later, since its configuration is that of its folder, and so is a
    sweep's job, which is a process of its own.
    """
    hydra = HydraConfig.get()
    if cfg.resume or hydra.mode == RunMode.MULTIRUN:
        return
    folder = hydra.runtime.output_dir
    if status := one_line_errors(partial(examine, cfg), log=Path(folder) / LOG):
        with suppress(UserError):  # another process's folder is left to it
            claim(folder)
            discard_if_empty(folder)
        sys.exit(status)


def examine(cfg: DictConfig) -> None:
    """Raise UserError for the first key that is wrong by itself, or that names a score which the
    reward lacks.
    """
    validate(cfg)
    # Only now, since it imports PyTorch, as the targets have.
    from flowrl.launch.scores import check_parts

    check_parts(cfg)
