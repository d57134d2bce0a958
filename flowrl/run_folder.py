"""The folder that a run writes to: one process at a time, and a link to the newest."""

from __future__ import annotations

import fcntl
import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)


def claim(folder: str) -> None:
    """Lock a run's folder until this process ends. Raises ValueError where another process has it."""
    try:
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"run_dir={folder} is being written to by another process; choose another") from error
    except OSError:
        log.warning("%s: this file system has no locks; keep other runs out of the folder", folder)


def point_latest_at(folder: Path) -> None:
    """Make `outputs/latest`, beside the runs' folders, a link to this run."""
    root = next((parent for parent in folder.absolute().parents if parent.name == "outputs"), None)
    if root is None:
        return
    link, fresh = root / "latest", root / f".latest.{os.getpid()}"
    fresh.symlink_to(folder.resolve(), target_is_directory=True)
    fresh.replace(link)
