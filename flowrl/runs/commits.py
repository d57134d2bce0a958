"""The commits that a run's code is of: FlowRL's, where it is a checkout, and those of whoever uses
it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from flowrl.runs.installation import PACKAGE, REPOSITORY

INSTALLED = {"site-packages", "dist-packages", f"python{sys.version_info[0]}.{sys.version_info[1]}"}
"""Folders below which modules belong to no repository, though one may lie around them."""


LONGEST = 10.0
"""Seconds that git may take; a repository for which it takes longer is passed over."""


def flowrl_commit() -> str | None:
    """Return the checked-out commit of FlowRL, with `+` where there are changes; None for an
    installed package, which may lie within somebody else's repository.
    """
    if REPOSITORY is None or _top(REPOSITORY) != REPOSITORY.resolve():
        return None
    return _commit(REPOSITORY, is_running=True)


def project_commits() -> dict[str, str]:
    """Return the commits of the other repositories that this process works with, by their folders'
    names: that of the working directory, and those that its modules come from.

    Changes are told of the latter alone. The working directory may be somebody else's repository,
    and looking for changes runs what its settings and hooks name.
    """
    running = {_top(folder) for folder in set(_module_folders())}
    tops = running | {_top(Path.cwd())}
    commits = {}
    for top in sorted(top for top in tops if top is not None):
        if REPOSITORY is not None and top == REPOSITORY.resolve():
            continue
        if (commit := _commit(top, is_running=top in running)) is not None:
            commits[top.name] = commit
    return commits


def short(revision: object, num_digits: int = 10) -> str:
    """Cut a commit to its first digits, and keep the `+` that tells of changes."""
    text = str(revision)
    mark = "+" if text.endswith("+") else ""
    return text[:num_digits] + mark


def _module_folders() -> Iterator[Path]:
    """Walk the folders of all imported modules that are neither installed nor FlowRL's."""
    ours = (PACKAGE, PACKAGE.parent / "hydra_plugins")
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if not isinstance(file, str) or not os.path.isabs(file):
            continue
        path = Path(file)
        if INSTALLED.isdisjoint(path.parts) and not any(map(path.is_relative_to, ours)):
            yield path.parent


def _top(folder: Path) -> Path | None:
    """Return the root of the repository that a folder lies in; None outside of one."""
    top = _git(folder, "rev-parse", "--show-toplevel")
    return Path(top).resolve() if top else None


def _commit(top: Path, *, is_running: bool) -> str | None:
    """Return the checked-out commit of a repository, and, where its code is running anyway, with
    `+` if there are changes; None before the first.
    """
    head = _git(top, "rev-parse", "HEAD")
    if not head or not is_running:
        return head or None
    quiet = ("--no-optional-locks", "-c", "core.fsmonitor=false")
    changed = _git(top, *quiet, "status", "--porcelain", "--ignore-submodules=all")
    return f"{head}+" if changed else head


def _git(folder: Path, *arguments: str) -> str:
    """Return what git prints about the repository around a folder, without variables that give it
    another one or commands to run; an empty text where it fails.
    """
    # Within a git hook, for one, GIT_DIR names the repository that the hook is of.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            env=variables,
            capture_output=True,
            text=True,
            timeout=LONGEST,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
