"""The messages of libraries while they are imported, before anything of this package computes."""

from __future__ import annotations

import logging


def hush_imports() -> None:
    """Leave out what bitsandbytes, where it is installed, says on some processors whenever it is
    imported, as diffusers does: that a package is missing which only speeds up inference there.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
