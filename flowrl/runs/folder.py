"""The folder that a run writes to: one process at a time, and a link to the newest.

The lock is the system's on the folder itself. filelock would need a file in it, which would stay
behind in a folder that is to be removed where nothing was written.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from contextlib import suppress
from pathlib import Path

from flowrl.errors import UserError

log = logging.getLogger(__name__)

PATIENCE = 0.5
"""Seconds for which a lock may be another's before it is taken for a run's: who only asks whether a
folder is claimed has it for an instant.
"""
PAUSE = 0.02
"""Seconds between two attempts."""

_claimed: set[str] = set()
"""Folders that this process has locked."""
_new: dict[str, str] = {}
"""Folders that this process has made, by the name that was asked for."""


def make_new(name: str) -> str:
    """Make a folder that no other process has, and return its path: `name`, or with -2, -3, ...
    where that is taken.

    Runs that start in the same second ask for one name. Asked again, a process gets the folder that
    it has made.
    """
    number = 1
    while name not in _new:
        folder = Path(name if number == 1 else f"{name}-{number}")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError:
            return name  # whoever writes there first says what is wrong
        # Making it is the question whether it is taken: no other process can come in between.
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        except OSError:
            return name
        else:
            _new[name] = str(folder)
    return _new[name]


def claim(folder: str) -> None:
    """Lock a run's folder on this machine until the process ends. Raises UserError where another
    process has it.
    """
    try:
        # It is never closed: the system unlocks it when the process ends, however it does.
        descriptor = os.open(folder, os.O_RDONLY)
        _lock(descriptor)
    except BlockingIOError as error:
        raise UserError(
            f"run_dir={folder} is being written to by another process; wait for it, stop it, or "
            "choose another"
        ) from error
    except OSError as error:
        log.warning("%s cannot be locked (%s); keep other runs out of it", folder, error.strerror)
    _claimed.add(folder)


def _lock(descriptor: int) -> None:
    """Lock an open folder. Raises BlockingIOError where another process keeps its lock."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(PAUSE)
        else:
            return


def is_claimed(folder: Path) -> bool:
    """Tell whether a process of this machine holds the lock of a run's folder; False where that
    cannot be known.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        # A shared lock, which two who ask at once do not keep from each other. There is no way to
        # ask without one, so `claim` is patient.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def discard_if_empty(folder: str) -> None:
    """Remove a run's folder where nothing was written; another process's is left to it."""
    if folder in _claimed:
        # Only an empty folder can be removed so.
        with suppress(OSError):
            Path(folder).rmdir()


def point_latest_at(folder: Path) -> None:
    """Make `outputs/latest`, beside the runs' folders, a link to this run; where that is
    impossible, say so.
    """
    outputs = [parent for parent in folder.absolute().parents if parent.name == "outputs"]
    if not outputs:
        return
    root = outputs[0]
    link = root / "latest"
    # A link cannot be changed, only replaced; a reader in between would miss it.
    fresh = root / f".latest.{os.getpid()}"
    try:
        fresh.symlink_to(folder.resolve(), target_is_directory=True)
        fresh.replace(link)
    except OSError as error:
        # Links are impossible on some network drives, or a folder has that name.
        log.warning(
            "%s cannot be made a link to this run (%s); the run goes on", link, error.strerror
        )
        with suppress(OSError):
            fresh.unlink(missing_ok=True)
