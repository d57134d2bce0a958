"""The commits of a run: FlowRL's own, and its user's apart."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from flowrl.runs import commits, provenance
from flowrl.runs.commits import flowrl_commit, project_commits, short

AUTHOR = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")


def git(folder, *words):
    line = ["git", *AUTHOR, *words]
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def make(tmp_path):
    """Make a repository with one commit of one file."""

    def make(name):
        folder = tmp_path / name
        folder.mkdir()
        git(folder, "init", "-q")
        (folder / "code.py").write_text("a = 1\n")
        git(folder, "add", ".")
        git(folder, "commit", "-qm", "first")
        return folder

    return make


def test_the_users_commits_are_told_apart_from_flowrls(make, monkeypatch):
    """That of the working directory and that of an imported module, by name; what is installed
    below one is not of it. Mutation: take either alone, or the repository around an installed
    module.
    """
    acme = make("acme")
    rewards = make("rewards")
    around = make("around")
    for name, file in {
        "private_module": rewards / "code.py",
        "installed_module": around / ".venv" / "lib" / "site-packages" / "it" / "__init__.py",
    }.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        module = types.ModuleType(name)
        module.__file__ = str(file)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.chdir(acme)
    known = {
        name: git(folder, "rev-parse", "HEAD")
        for name, folder in {"acme": acme, "rewards": rewards}.items()
    }
    assert project_commits() == known
    for folder in (acme, rewards):
        (folder / "code.py").write_text("a = 2\n")
    # Changes are told of what runs.
    assert project_commits() == {"acme": known["acme"], "rewards": known["rewards"] + "+"}
    assert flowrl_commit() not in known.values()


def test_an_installed_package_has_no_commit(make, monkeypatch):
    """A private repository often lies around it. Mutation: record its commit as FlowRL's."""
    around = make("around")
    monkeypatch.setattr(commits, "REPOSITORY", None)
    assert flowrl_commit() is None
    # A copy without history, below somebody's repository.
    (around / "copy").mkdir()
    monkeypatch.setattr(commits, "REPOSITORY", around / "copy")
    assert flowrl_commit() is None
    monkeypatch.setattr(commits, "REPOSITORY", around)
    assert flowrl_commit() == git(around, "rev-parse", "HEAD")
    monkeypatch.chdir(around)
    assert "around" not in project_commits()


@pytest.mark.parametrize(
    "setting", [("core.fsmonitor", "touch {}; false"), ("filter.x.clean", "touch {}; cat")]
)
def test_a_repository_that_is_only_stood_in_runs_nothing(setting, make, tmp_path, monkeypatch):
    """Mutation: ask for changes with the settings that came with it."""
    folder = make("downloaded")
    marker = tmp_path / "ran"
    key, command = setting
    git(folder, "config", key, command.format(marker))
    (folder / ".gitattributes").write_text("* filter=x\n")
    hook = folder / ".git" / "hooks" / "post-index-change"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(f"#!/bin/sh\ntouch {marker}\n")
    hook.chmod(0o755)
    (folder / "code.py").write_text("a = 2\n")
    monkeypatch.chdir(folder)
    head = (folder / ".git" / "refs" / "heads").rglob("*")
    (commit,) = [path.read_text().strip() for path in head if path.is_file()]
    assert project_commits()["downloaded"] == commit
    assert not marker.exists()


def test_what_changed_is_told_of_either(monkeypatch):
    """A record of an earlier version has neither FlowRL's version nor projects, and may hold the
    user's commit as FlowRL's. Mutation: compare what it lacks.
    """
    now = {"versions": {"flowrl": "2"}, "git_revision": "a" * 40, "projects": {"acme": "b" * 40}}
    assert provenance.changes(now, now) == []
    other = now | {"projects": {"acme": "c" * 40 + "+", "old": "d" * 40}}
    assert provenance.changes(other, now) == [
        "commit of acme cccccccccc+ -> bbbbbbbbbb",
        "commit of old dddddddddd -> None",
    ]
    earlier = {"versions": {}, "git_revision": "d" * 40}
    assert provenance.changes(earlier, now) == ["commit dddddddddd -> aaaaaaaaaa"]
    assert provenance.changes(earlier, now | {"git_revision": None}) == []
    assert provenance.changes(now | {"versions": {"flowrl": "1"}}, now) == ["flowrl 1 -> 2"]
    assert short(None) == "None"


def test_a_run_is_recorded_with_both(make, monkeypatch):
    """Mutation: leave the version or the projects out."""
    monkeypatch.chdir(make("acme"))
    recorded = provenance.environment()
    assert recorded["versions"]["flowrl"] and list(recorded["projects"]) == ["acme"]
    assert Path.cwd().name == "acme"


def test_git_is_asked_without_variables_that_give_it_commands(tmp_path, monkeypatch):
    """Mutation: hand the environment on."""
    marker = tmp_path / "ran"
    before = flowrl_commit()
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "core.fsmonitor")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", f"touch {marker}; false")
    assert flowrl_commit() == before
    assert not marker.exists()
