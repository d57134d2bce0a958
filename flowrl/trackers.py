"""Experiment trackers that need a decision: W&B online with a key, offline by itself without one."""

from __future__ import annotations

import netrc
import os
import uuid
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.loggers import WandbLogger

WANDB_HOST = "api.wandb.ai"


def wandb_logger(*, project: str, name: str, group: str | None, tags: Sequence[str], folder: str) -> WandbLogger:
    """A W&B run whose id is kept in `folder/wandb_id`, so that a resumed run continues it."""
    id_file = Path(folder) / "wandb_id"
    if not id_file.is_file():
        id_file.write_text(uuid.uuid4().hex[:8])
    os.environ.setdefault("WANDB_SILENT", "true")
    is_disabled = os.environ.get("WANDB_MODE") == "disabled"
    return WandbLogger(
        project=project,
        name=name,
        group=group,
        tags=list(tags),
        save_dir=folder,
        id=id_file.read_text(),
        resume="allow",
        offline=not has_wandb_key() and not is_disabled,
        log_model=False,
    )


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
