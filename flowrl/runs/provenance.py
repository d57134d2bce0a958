"""The things that a run is made of besides its configuration: the code, the packages, the prompts,
and the files it names.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_CACHE

from flowrl import __version__
from flowrl.runs.commits import flowrl_commit, project_commits, short
from flowrl.runs.files import file_digest
from flowrl.types import Prompt

PACKAGES = ("torch", "diffusers", "transformers", "peft", "lightning", "hydra-core", "numpy")

FLOWRL = "flowrl"

PATH_WORDS = {"path", "file", "folder", "pretrained", "processor", "weights", "exclude"}
PATH_WORDS |= {"start", "lora"}
"""Last words of the keys that name files, folders or hub repositories."""

READ_WHOLE = 2**26
"""Bytes up to which a file's content is compared; a larger one is known by its size, its head and
samples of it.
"""

NUM_SAMPLES = 256
SAMPLE_SIZE = 2**14
"""Blocks of a large file that are compared, evenly spaced from its first to its last bytes, and
their bytes.
"""

DIGESTS = 2
"""The version of how files are digested; earlier ones, which went by the time of change, are not
compared with.
"""

FILE, FOLDER, HUB = "file", "folder", "hub"
"""Kinds of what a key names by path."""

HUB_ID = re.compile(r"([\w.-]+)/([\w.-]+)(/.+)?")
"""ORG/NAME, or ORG/NAME/FILE."""


def environment() -> dict[str, Any]:
    """Return the commits and the versions of the packages that decide a run's numbers.

    `git_revision` is FlowRL's, where that is a checkout; `projects` has those of the repositories
    of its user, by name.
    """
    versions = {name: version(name) for name in PACKAGES}
    versions["python"] = platform.python_version()
    versions[FLOWRL] = __version__
    return {
        "versions": versions,
        "git_revision": flowrl_commit(),
        "projects": project_commits(),
    }


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """List what differs between two environments, as texts such as `torch 2.8.0 -> 2.9.0`."""
    texts = []
    commit_before = before.get("git_revision")
    commit_now = now["git_revision"]
    # An earlier version took the repository around an installed package for FlowRL's.
    is_comparable = "projects" in before or commit_now is not None
    if is_comparable and commit_before != commit_now:
        texts.append(f"commit {short(commit_before)} -> {short(commit_now)}")
    texts += _project_changes(before.get("projects"), now["projects"])
    # The file may have been edited; what cannot be read in it counts as another version.
    versions = before.get("versions")
    old = versions if isinstance(versions, dict) else {}
    for name, new in now["versions"].items():
        is_unknown = name == FLOWRL and name not in old  # of an earlier version
        if old.get(name) != new and not is_unknown:
            texts.append(f"{name} {old.get(name)} -> {new}")
    return texts


def _project_changes(before: Any, now: Mapping[str, str]) -> list[str]:
    """List which repositories of the user have other commits; none where none were recorded."""
    if not isinstance(before, dict):
        return []
    texts = []
    for name in sorted({*before, *now}):
        old = before.get(name)
        new = now.get(name)
        if old != new:
            texts.append(f"commit of {name} {short(old)} -> {short(new)}")
    return texts


def prompts_digest(prompts: Iterable[Prompt]) -> str:
    """Compute a digest of prompts in their order: their texts, families, metadata and pictures."""
    digest = hashlib.sha256()
    for prompt in prompts:
        line = [prompt.text, prompt.family, dict(prompt.metadata), *prompt.digests]
        # Metadata of the same content may come in another order of its keys.
        text = json.dumps(line, sort_keys=True, default=str)
        digest.update(text.encode() + b"\n")
    return digest.hexdigest()


def path_digest(key: str, value: Any, revision: str | None = None) -> str | None:
    """Compute a digest of the file, folder or cached hub repository that a configuration's value
    names; None where it names none.

    A folder, a hub id and a word without a slash, a dot or a tilde, such as `train`, is taken for a
    path only where the key ends in one of `PATH_WORDS`.
    """
    if not isinstance(value, str):
        return None
    is_path = key.rpartition(".")[2] in PATH_WORDS
    looks_like_path = any(mark in value for mark in "/.~")
    if not (is_path or looks_like_path):
        return None
    try:
        path = Path(value).expanduser()
        if path.is_file():
            return _file_digest(path)
        if path.is_dir():
            return _folder_digest(path) if is_path else None
    except (OSError, ValueError, RuntimeError):
        # No name of a file, or unreadable: its reader says so.
        return None
    return hub_commit(value, revision) if is_path else None


def path_kind(value: str) -> str:
    """Return the kind of what a value with a digest names."""
    path = Path(value).expanduser()
    if path.is_dir():
        return FOLDER
    return FILE if path.is_file() else HUB


def _file_digest(path: Path) -> str:
    """Compute a digest of a file: of all of it, or of samples where it is large."""
    size = path.stat().st_size
    if size <= READ_WHOLE:
        return file_digest(path)
    # Weights of tens of gigabytes would be read for minutes at every start.
    return _sampled_digest(path, size)


def _sampled_digest(path: Path, size: int) -> str:
    """Compute a digest of a large file's size, of a safetensors file's header and of blocks all
    over it.

    The time of change is left out: a copy of the file is the same input.
    """
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            # The format's first eight bytes are the length of its header, the tensors' names and
            # shapes. A length that is no header's must not have all of the file read.
            length = int.from_bytes(file.read(8), "little")
            digest.update(file.read(min(length, READ_WHOLE)))
        last_start = size - SAMPLE_SIZE
        for i in range(NUM_SAMPLES):
            file.seek(last_start * i // (NUM_SAMPLES - 1))
            digest.update(file.read(SAMPLE_SIZE))
    return digest.hexdigest()


def _folder_digest(folder: Path) -> str:
    """Compute a digest of the files below a folder, with their paths in it."""
    digest = hashlib.sha256()
    # In a fixed order: the system lists files as it likes.
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        line = f"{path.relative_to(folder)} {_file_digest(path)}\n"
        # A file's name need not be UTF-8.
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()


def hub_commit(value: str, revision: str | None) -> str | None:
    """Look up the commit of ORG/NAME, or of ORG/NAME/FILE, in the local hub cache; None where it is
    not there.
    """
    match = HUB_ID.fullmatch(value)
    if match is None:
        return None
    # The cache keeps in this file which commit a branch or tag was when it was last looked up.
    repository = Path(HF_HUB_CACHE, f"models--{match[1]}--{match[2]}")
    reference = repository / "refs" / (revision or "main")
    if not reference.is_file():
        return None
    return reference.read_text().strip()
