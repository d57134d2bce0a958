"""The place of a process among those of its run, as its launcher tells it before they have met."""

from __future__ import annotations

import os


def rank() -> int:
    """Return this process's number among those of the run, 0 for one that is alone.

    torchrun sets RANK; Lightning and a sweep, which start the processes of one machine themselves,
    LOCAL_RANK alone; srun SLURM_PROCID. This is the order in which Lightning looks, too.
    """
    return _first("RANK", "LOCAL_RANK", "SLURM_PROCID")


def local_rank() -> int:
    """Return this process's number among those on its machine, which is the number of its GPU."""
    return _first("LOCAL_RANK", "SLURM_LOCALID")


def _first(*names: str) -> int:
    """Return the number in the first of these variables that is set; 0 where none is."""
    for name in names:
        if name in os.environ:
            return int(os.environ[name])
    return 0
