"""Experiment trackers that need a decision: W&B online with a key, offline by itself without one."""

from __future__ import annotations

import netrc
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from lightning.pytorch.loggers import Logger, WandbLogger

from flowrl.bounds import Text
from flowrl.modules.parallel import is_later_rank

WANDB_HOST = "api.wandb.ai"


def wandb_logger(
    *, project: Text, name: Text, group: Text | None, job_type: Text, tags: Sequence[Text] | None, folder: Text
) -> WandbLogger:
    """A W&B run whose id is kept in `folder/wandb_id`, so that a resumed run continues it.

    Without a `group` it is the sweep's, which W&B reads from WANDB_RUN_GROUP.
    """
    id_file = Path(folder) / "wandb_id"
    if not id_file.is_file() and not is_later_rank():
        id_file.write_text(uuid.uuid4().hex[:8])
    os.environ.setdefault("WANDB_SILENT", "true")
    is_disabled = os.environ.get("WANDB_MODE") == "disabled"
    logger = WandbLogger(
        project=project,
        name=name,
        group=group,
        job_type=job_type,
        tags=list(tags or ()),
        save_dir=folder,
        id=id_file.read_text() if id_file.is_file() else None,  # later ranks have no run
        resume="allow",
        offline=not has_wandb_key() and not is_disabled,
        log_model=False,
    )
    logger._wandb_init.pop("anonymous", None)  # Lightning hands it on though W&B no longer takes it, and warns
    return logger


def has_wandb_key() -> bool:
    """Whether a key is configured by environment or netrc and WANDB_MODE does not forbid using it."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return False
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(WANDB_HOST) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def default_tags(choices: Mapping[str, str], delta: object) -> list[str]:
    """What tells runs apart, from the options chosen and the loss's threshold, if it has one."""
    own = [f"{group}={choices[group]}" for group in ("sampler", "loss", "model", "reward")]
    return own if delta is None else [*own, f"delta={delta}"]


def alert(loggers: Sequence[Logger], title: str, text: str, *, level: Literal["WARN", "ERROR"]) -> None:
    """Send a W&B alert, as mail or in Slack, by its user's settings; other trackers have none."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.alert(title=title, text=text, level=level)
