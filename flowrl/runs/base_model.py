"""Whether a base model was a folder. A folder's path may have the form ORG/NAME of the hub's ids,
so a run records what it found where it was started, and is read by that elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowrl.errors import UserError
from flowrl.runs.description import is_hub_id, plain_name
from flowrl.runs.files import PROVENANCE, read_object
from flowrl.runs.provenance import FOLDER, hub_commit

KEY = "model.pretrained"
_SHA256 = 64
"""Digits of the digests of folders; a commit of the hub has 40."""

Config = Mapping[str, Any]


def named_here(config: Config) -> Config:
    """Return a configuration of this process's, in which a base model that is a folder goes by its
    last name, which is no hub id.
    """
    return _by_name(config) if Path(_pretrained(config)).expanduser().is_dir() else config


def named_in_run(config: Config, folder: Path) -> Config:
    """Return the configuration of the run in `folder`, in which a base model that was a folder goes
    by its last name.

    So does one of which an early run has no record, unless the hub's cache here has a repository of
    that name: a folder that is taken for somebody's repository would be worse.
    """
    text = _pretrained(config)
    if not is_hub_id(text):
        return config
    was_folder = is_recorded_folder(config, folder)
    if was_folder is None:
        revision = config["model"].get("revision")
        was_folder = Path(text).is_dir() or hub_commit(text, revision) is None
    return _by_name(config) if was_folder else config


def is_recorded_folder(config: Config, folder: Path) -> bool | None:
    """Tell whether the run in `folder` found a folder under its base model's name; None for an
    early run, which recorded no inputs, and where the record is damaged.
    """
    path = folder / PROVENANCE
    if not path.is_file():
        return None
    try:
        inputs = read_object(path, "restore it").get("inputs")
    except UserError:
        # No reason to lose what was learned, whose export asks too.
        return None
    if not isinstance(inputs, dict):
        return None
    found = inputs.get(KEY)
    # A repository that the cache did not know has no digest; a folder always has one.
    if not isinstance(found, dict) or found.get("value") != _pretrained(config):
        return False
    kind = found.get("kind")
    if kind is not None:
        return bool(kind == FOLDER)
    # Of a run before kinds were recorded.
    return len(str(found.get("digest"))) == _SHA256


def _pretrained(config: Config) -> str:
    model = config.get("model")
    return str(model.get("pretrained") or "") if isinstance(model, Mapping) else ""


def _by_name(config: Config) -> Config:
    """Return the configuration with the last name of its base model's path."""
    model = {**config["model"], "pretrained": plain_name(_pretrained(config))}
    return {**config, "model": model}
