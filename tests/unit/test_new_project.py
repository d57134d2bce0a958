"""`flowrl new`: what it writes, what it refuses."""

import os
import re
import shutil
import subprocess

import forks
import pytest
import torch
import yaml
from runs import ROOT

from flowrl.cli.new import TEMPLATE, check_name, write_project
from flowrl.errors import UserError
from flowrl.launch.compose import compose
from flowrl.launch.search_path import with_config_dir
from flowrl.runs.provenance import path_digest


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return write_project("acme_2", tmp_path_factory.mktemp("place"))


def test_a_project_has_its_name_throughout(project):
    """Mutation: write the template's own name, or forget the file that git reads."""
    files = [path for path in project.rglob("*") if path.is_file()]
    names = {str(path.relative_to(project)) for path in files}
    expected = {".gitignore", "acme_2/rewards.py", "acme_2/losses.py", "tests/test_acme_2.py"}
    assert expected <= names and len(names) == len([*TEMPLATE.rglob("*.jinja")])
    for path in files:
        text = path.read_text()
        assert "NAME" not in text and "{{" not in text, path
        assert max(map(len, text.splitlines())) <= 100, path
    assert 'name = "acme-2"' in (project / "pyproject.toml").read_text()
    readme = (project / "README.md").read_text()
    assert len(re.findall(r"^flowrl .*--config-dir conf", readme, re.MULTILINE)) >= 5
    if (ruff := shutil.which("ruff")) is not None:
        subprocess.run([ruff, "check", "--isolated", project], check=True)


def test_its_configuration_is_small_and_composes(project, monkeypatch):
    """Mutation: name a class that is not there, or a file of prompts."""
    monkeypatch.chdir(project)
    monkeypatch.syspath_prepend(project)
    paths = [*(project / "conf").rglob("*.yaml")]
    assert len(paths) == 3
    for path in paths:
        assert path.read_text().startswith("#") and len(path.read_text().splitlines()) <= 16
        assert isinstance(yaml.safe_load(path.read_text()), dict)
    cfg = compose(with_config_dir(["name=t", "experiment=first"], project / "conf"))
    from hydra.utils import get_object

    assert get_object(cfg.reward._target_).__name__ == "Coverage"
    assert get_object(cfg.loss._target_).__name__ == "SPO" and cfg.loss.bound == cfg.trust.clip
    assert path_digest("path", cfg.data.prompts.path) is not None


def test_its_loss_and_reward_are_what_their_texts_say(project, monkeypatch):
    """By its own tests but the one that starts a process. Mutation: flip a sign in either."""
    words = ["-m", "pytest", "-q", "-k", "not can_be_trained"]
    done = forks.run(*words, cwd=project, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert "4 passed" in done.stdout, done.stdout + done.stderr
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Acme-Corp", "no name of a Python package; take .* such as acme_corp"),
        ("a/b", "such as a_b"),
        ("2acme", "such as acme"),
        ("class", "digits and underscores$"),
        ("torch", "has a package of that name here"),
        ("json", "has a package of that name here"),
        ("flowrl", "has a package of that name here"),
    ],
)
def test_a_name_that_cannot_be_is_refused(name, message, tmp_path):
    """Mutation: write it all the same."""
    with pytest.raises(UserError, match=message):
        write_project(name, tmp_path)
    assert not [*tmp_path.iterdir()]
    check_name("acme_corp")


def test_a_folder_that_exists_is_left_alone(tmp_path):
    """Mutation: write into it."""
    (tmp_path / "acme").mkdir()
    with pytest.raises(UserError, match=r"acme exists; take another name, or remove it"):
        write_project("acme", tmp_path)
    assert not [*(tmp_path / "acme").iterdir()]
