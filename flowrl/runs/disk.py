"""A full disk told in one line, wherever it was met."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from flowrl.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_CODES = tuple(f"os error {code}" for code in _FULL)
"""How libraries in Rust, such as safetensors, tell it within an error of their own."""


class DiskFull(UserError):
    """There is no space left to write to."""


def is_full(error: BaseException | None) -> bool:
    """Tell whether an error, or one that it was raised from or while handling, says that there is
    no space left.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if any(code in str(error) for code in _CODES):
            return True
        error = error.__cause__ or error.__context__
    return False


def free(folder: Path) -> str:
    """Return the space left where a folder lies, in words."""
    # The folder may be one that there was no space to make.
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    return in_words(shutil.disk_usage(existing).free)


def in_words(size: float) -> str:
    """Put a number of bytes into words as users read it, in units of 1000 bytes as disks are
    sold.
    """
    for unit in ("bytes", "KB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
