"""The package as others get it: its name, what it forbids, its version and its notices."""

import re
import subprocess
import sys
import tomllib

import pytest
import yaml

PROSE = (".md", ".py", ".yaml", ".toml", ".cff")
STRANGERS = re.compile(r"pip install[^\n]{0,80}?\bflowrl\b(?!-lightning)|\bflowrl\[")


@pytest.fixture
def project(root):
    """The table `project` of pyproject.toml."""
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


def test_nobody_is_told_to_install_the_strangers_package(root):
    """Mutation: `pip install 'flowrl[ocr]'` in an error message or in the README."""
    assert STRANGERS.search("pip install 'flowrl" + "[ocr]'")
    assert STRANGERS.search("pip install flow" + "rl")
    assert not STRANGERS.search("pip install 'flowrl-lightning[ocr]'")
    listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True)
    paths = [root / name for name in listed.stdout.split("\n") if name.endswith(PROSE)]
    assert len(paths) > 300
    tests = root / "tests"
    told = {
        str(path.relative_to(root)): match[0]
        for path in paths
        if path.is_file() and not path.is_relative_to(tests)
        if (match := STRANGERS.search(path.read_text())) is not None
    }
    assert told == {}


def test_each_package_is_named_once_and_compromised_releases_never(project):
    """Mutation: name pydantic twice, or admit lightning 2.6.2."""
    from packaging.requirements import Requirement

    needs = [Requirement(text) for text in project["dependencies"]]
    names = [need.name for need in needs]
    assert len(names) == len(set(names))
    (lightning,) = (need.specifier for need in needs if need.name == "lightning")
    versions = ("2.5.9", "2.6.0", "2.6.1", "2.6.2", "2.6.3", "2.6.4", "3.0.0")
    assert [*lightning.filter(versions)] == ["2.6.0", "2.6.1", "2.6.4"]


def test_the_version_is_the_installed_one(tmp_path, root, project):
    """And it is looked up only when asked for. Mutation: write it into the package."""
    place = tmp_path / "flowrl_lightning-9.8.7.dist-info"
    place.mkdir()
    (place / "METADATA").write_text(
        f"Metadata-Version: 2.4\nName: {project['name']}\nVersion: 9.8.7\n"
    )
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(root)!r}]; before = set(sys.modules);"
        "import flowrl; new = set(sys.modules) - before;"
        "print('importlib.metadata' in new, flowrl.__version__)"
    )
    command = [sys.executable, "-c", code]
    told = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert told.stdout == "False 9.8.7\n", told.stderr


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    """Mutation: give every name the version."""
    import flowrl

    with pytest.raises(AttributeError, match="no_such_name"):
        flowrl.no_such_name  # noqa: B018


def test_licence_notice_and_citation(root, project):
    """LIVE's notice stands whole in NOTICE, as it asks to. Mutation: shorten it, or cite another
    version.
    """
    assert "Version 2.0, January 2004" in (root / "LICENSE").read_text()
    source = (root / "flowrl/rewards/assets/brisque.txt").read_text()
    notice = source[
        source.index("Copyright (c) 2011") : source.index("-----------COPYRIGHT NOTICE EN")
    ]
    assert notice in (root / "NOTICE").read_text()
    assert project["license-files"] == ["LICENSE", "NOTICE"]
    citation = yaml.safe_load((root / "CITATION.cff").read_text())
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"] == "Apache-2.0"
