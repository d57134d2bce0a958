"""The files of a run's or a sweep's folder by name, and writing them so that a kill never leaves half of one."""

from __future__ import annotations

from pathlib import Path

CONFIG = "config.yaml"
"""The resolved configuration, by which a run's folder is known."""

SOURCE = "source.yaml"
"""The configuration with its interpolations: a resumed run starts from it, so that overrides reach every use."""

SUMMARY = "summary.json"
METRICS = "metrics.csv"

LOG = "train.log"
"""Warnings and errors, with the tracebacks of unexpected ones; only where there are any."""

CHECKPOINTS = "checkpoints"


def write_whole(path: Path, text: str) -> None:
    """Write a UTF-8 text file so that a kill leaves the old or the new content, never a mixture."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
