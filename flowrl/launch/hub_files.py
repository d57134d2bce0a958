"""The files and hub repositories that a configuration names: whether each is there, before anything
reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import constants
from omegaconf import DictConfig, OmegaConf

from flowrl.errors import UserError
from flowrl.launch.changes import leaves
from flowrl.models.hub import UNREACHABLE
from flowrl.models.loading import EMBEDDED, read_index, resolve
from flowrl.runs.provenance import HUB_ID, PATH_WORDS, hub_commit, short
from flowrl.values.plural import counted

GROUPS = ("model", "reward", "lora", "teachers")
"""The groups whose keys name weights; prompts are read whole, wherever they stand."""


def describe_files(cfg: DictConfig) -> list[str]:
    """Say of each file, folder and hub repository that the model, the reward, the LoRA and the
    teachers name where it is.

    Raises UserError for a path where nothing is, and for a repository that is not to be had. Of the
    model's its index is fetched, which is small.
    """
    pretrained = cfg.model.pretrained
    read_index(resolve(pretrained), pretrained, cfg.model.get("revision"))
    lines = []
    for key, value, revision in _named(cfg):
        lines.append(f"{key}={value}: {_place(key, value, revision)}")
    return lines


def _named(cfg: DictConfig) -> Iterator[tuple[str, str, str | None]]:
    """Walk the keys that name a place, with their values and revisions."""
    for group in GROUPS:
        if cfg.get(group) is None:
            continue
        node = OmegaConf.to_container(cfg[group], resolve=True)
        values = dict(leaves(node, group))
        for key, value in values.items():
            place, _, word = key.rpartition(".")
            if word in PATH_WORDS and isinstance(value, str):
                yield key, value, values.get(f"{place}.revision")


def _place(key: str, value: str, revision: str | None) -> str:
    """Say where a named file, folder or repository is."""
    if value.startswith(EMBEDDED):
        return "part of FlowRL"
    if Path(value).expanduser().exists():
        return "on this machine"
    if (match := HUB_ID.fullmatch(value)) is None:
        if value.startswith(("/", ".", "~")):
            raise UserError(f"{key}={value}: no such file or folder; give a path that exists")
        return "a name that its reader knows"
    commit = hub_commit(value, revision)
    folder = Path(constants.HF_HUB_CACHE, f"models--{match[1]}--{match[2]}", "snapshots")
    files = [path for path in (folder / str(commit)).rglob("*") if path.is_file()]
    if files:
        gigabytes = sum(path.stat().st_size for path in files) / 1e9
        amount = f"{counted(len(files), 'file')}, {gigabytes:.1f} GB"
        return f"in the local hub cache at {short(commit)}, {amount}; what lacks is downloaded"
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{key}={value}: {UNREACHABLE}")
    return "not in the local hub cache; it is downloaded when training starts"
