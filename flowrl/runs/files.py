"""The files of a run's or a sweep's folder by name, and reading and writing them so that none is
lost by halves.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from flowrl.errors import UserError

CONFIG = "config.yaml"
"""The resolved configuration, by which a run's folder is known."""

SOURCE = "source.yaml"
"""The configuration with its interpolations: a resumed run starts from it, so that overrides reach
every use.
"""

SUMMARY = "summary.json"
METRICS = "metrics.csv"

PROVENANCE = "provenance.json"
"""What a run was made of besides its configuration: commit, packages, prompts and the files that it
names.
"""

PARITY = "parity.json"
"""What the check of a derived model measured, before training began."""

LOG = "train.log"
"""Warnings and errors, with the tracebacks of unexpected ones; only where there are any."""

CHECKPOINTS = "checkpoints"

TEACHERS = "teachers"
"""The folder where a run keeps copies of the LoRAs that it distils, by the teachers' names."""

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The safe loader in C, where it was built: ten times faster, which counts for hundreds of runs."""


def write_whole(path: Path, text: str) -> None:
    """Write a UTF-8 text file so that a kill or a full disk leaves the old or the new content,
    never a mixture.
    """
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the path of a file to write, which takes the place of the one at `path` once it is
    whole, and is removed where writing fails.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    except Exception:
        partial.unlink(missing_ok=True)
        raise


def grant_usual_mode(path: Path) -> None:
    """Give a file, or every file in a folder, the mode that the umask leaves to new files: the
    safetensors library lets nobody but the owner read its files.
    """
    files = [path] if path.is_file() else list(path.rglob("*"))
    for file in files:
        if file.is_file():
            file.chmod(0o666 & ~UMASK)


def _umask() -> int:
    """Return the process's umask, which the system tells only to who sets another."""
    # A file that another thread makes in between gets the narrower mode, never a wider one.
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


UMASK = _umask()
"""Read when this module is imported, before there are threads that write files."""


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal digits; a large file is not held in
    memory.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damaged(path: Path, problem: object, remedy: str) -> UserError:
    """Return the error, in one line, that says what is wrong with a file, and what to do."""
    # Parsers tell where the fault is in several lines.
    one_line = " ".join(str(problem).split())
    return UserError(f"{path} is damaged ({one_line}); {remedy}")


def read_text(path: Path, remedy: str) -> str:
    """Read a UTF-8 file; one mark of byte order, as Windows programs write it, is dropped.

    Raises UserError, with the remedy, for any other encoding.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise damaged(path, f"not UTF-8 at byte {error.start}", remedy) from error


def read_json(path: Path, remedy: str) -> Any:
    """Read the value in a JSON file. Raises UserError, with the remedy, for a text that is not
    JSON.
    """
    try:
        return json.loads(read_text(path, remedy))
    except (json.JSONDecodeError, RecursionError) as error:
        raise damaged(path, error, remedy) from error


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """Read the object in a JSON file. Raises UserError, with the remedy, for another value."""
    value = read_json(path, remedy)
    if not isinstance(value, dict):
        raise damaged(path, "a JSON object was expected", remedy)
    return value


def read_yaml(path: Path, remedy: str) -> dict[str, Any]:
    """Read the names with values in a YAML file, none from an empty one. Raises UserError, with the
    remedy, for others.
    """
    text = read_text(path, remedy)
    try:
        value = yaml.load(text, LOADER)
    # PyYAML itself raises ValueError, for a date such as 2026-13-01.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise damaged(path, error, remedy) from error
    if not isinstance(value, dict | None):
        raise damaged(path, "it holds no configuration", remedy)
    return value or {}


def set_aside(path: Path, kind: str) -> Path:
    """Rename a file or folder to NAME.`kind`, with a number behind it where that name is taken, and
    return the new path.
    """
    number = 1
    target = path.with_name(f"{path.name}.{kind}")
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.{kind}.{number}")
    return path.rename(target)
