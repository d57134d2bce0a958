"""The folders that a configuration is composed from: FlowRL's, and those that a launch adds by
`--config-dir` or `hydra.searchpath`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from flowrl.errors import UserError
from flowrl.launch.foreign_targets import parse
from flowrl.runs.command_line import key_of, override
from flowrl.runs.installation import CONF

SEARCH_PATH = "hydra.searchpath"
"""Hydra's key for further folders of configuration."""
FILE = "file://"


def with_config_dir(words: Sequence[str], folder: Path | None) -> list[str]:
    """Return overrides, with the `folder` of `--config-dir` as one of them.

    Raises UserError for a folder that is not there, and beside `hydra.searchpath`, which it stands
    for.
    """
    if folder is None:
        return list(words)
    if not folder.is_dir():
        raise UserError(f"--config-dir {folder}: no such folder; give one with YAML files")
    if any(key_of(word) == SEARCH_PATH for word in words):
        raise UserError(
            f"--config-dir {folder}: {SEARCH_PATH} is given too; add the folder to its list"
        )
    place = override("", f"{FILE}{folder.resolve()}").removeprefix("=")
    return [*words, f"{SEARCH_PATH}=[{place}]"]


def searched_folders(overrides: Sequence[str], leaving_out: Path) -> list[Path]:
    """List FlowRL's folder and those that overrides add to it, as `--config-dir` does; none that
    lies in `leaving_out`.
    """
    places: list[str] = []
    for item in parse(overrides):
        value = item.value()
        if item.key_or_group == SEARCH_PATH and isinstance(value, list):
            places += map(str, value)
    # Whatever is no folder here, such as a package, vouches for nothing.
    local = [place.removeprefix(FILE) for place in places if place.startswith(FILE)]
    return _outside(map(Path, local), leaving_out)


def project_folders(hydra: Any, leaving_out: Path) -> list[Path]:
    """List the folders that Hydra, given its own configuration, composes from; none that lies in
    `leaving_out`.

    A job starts from a configuration in its own folder, which must not vouch for itself.
    """
    sources = hydra.runtime.config_sources
    paths = [Path(source.path) for source in sources if source.schema == "file" and source.path]
    return _outside(paths, leaving_out)


def _outside(folders: Iterable[Path], folder: Path) -> list[Path]:
    """Return FlowRL's folder and those of these folders that neither lie in `folder` nor hold it,
    since its own files would vouch for it then.
    """
    place = folder.resolve()
    paths = [path.resolve() for path in folders]
    apart = [
        path for path in paths if not path.is_relative_to(place) and not place.is_relative_to(path)
    ]
    return [CONF, *apart]


def search_flags(hydra: Any) -> list[str]:
    """Return what this launch's command line adds to the folders that Hydra composes from; a
    command that continues its runs repeats it.
    """
    flags = []
    for source in hydra.runtime.config_sources:
        if source.provider == "command-line":
            # Whole, since the command may be typed elsewhere.
            flags += ["--config-dir", str(Path(source.path).resolve())]
    # As they were typed: some hold interpolations that only a job can resolve.
    typed: Any = OmegaConf.to_container(hydra.overrides, resolve=False)
    return [*flags, *(item for item in typed["hydra"] if key_of(item) == SEARCH_PATH)]
