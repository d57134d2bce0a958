"""The keys of `lora` that a LoRA file says itself, which is light enough for a sweep's parent."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from flowrl.sweep.job import has_key

KEYS = ("rank", "alpha", "targets")
"""The keys of `lora` that a LoRA file says itself."""


def take_from_file(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Leave to the file of `lora.start` what the command line does not say, and make its path
    absolute, and those of the teachers' LoRAs.

    The model's rank, alpha and layers are those of a fresh adapter; written into the run's
    configuration, they would say what is not so. Those of the command line stay and must be the
    file's.
    """
    # The absolute path is that of the launch's directory: the run may be resumed from another.
    teachers = cfg.get("teachers")
    # What is none, or has no value yet, is told by the checks of all values.
    for node in teachers.values() if OmegaConf.is_dict(teachers) else ():
        if OmegaConf.is_dict(node) and node.get("lora"):
            node.lora = absolute(node.lora)
    if not cfg.lora.get("start"):
        return
    for key in KEYS:
        if not has_key(overrides, f"lora.{key}"):
            cfg.lora[key] = None
    cfg.lora.start = absolute(cfg.lora.start)


def absolute(path: str) -> str:
    """Return the path that is kept in a run's configuration for one that was given."""
    return str(Path(path).expanduser().resolve())
