"""Workflows, issue forms and the container file: what they name is there."""

import re

import pytest
import yaml
from runs import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
KINDS = {"textarea", "input", "dropdown", "checkboxes", "markdown"}


def steps(path):
    """All steps of a workflow."""
    workflow = yaml.safe_load(path.read_text())
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def targets():
    """The targets of the Makefile."""
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_calls_what_is_there(path):
    """Its targets, and the files that it hands over.

    Mutation: rename a target or a file, or let a workflow write into the repository.
    """
    workflow = yaml.safe_load(path.read_text())
    assert workflow["name"] == path.stem and workflow["permissions"] == {"contents": "read"}
    # YAML 1.1 reads the key `on` as true.
    assert workflow[True]
    assert all(job["timeout-minutes"] <= 60 for job in workflow["jobs"].values())
    lines = [step["run"] for step in steps(path) if "run" in step]
    called = [word for line in lines for word in re.findall(r"\bmake ([a-z-]+)", line)]
    assert set(called) <= targets()
    files = [word for line in lines for word in re.findall(r"[\w/]+\.(?:txt|py|toml)", line)]
    assert all((ROOT / name).is_file() for name in files)
    for step in steps(path):
        assert ("run" in step) != bool(re.fullmatch(r"actions/[\w-]+@v\d+", step.get("uses", "")))


def test_the_workflows_are_those_that_a_project_needs():
    """Mutation: leave one out, or test one Python alone."""
    assert [path.stem for path in WORKFLOWS] == ["docs", "test", "wheel"]
    text = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    assert yaml.safe_load(text)["jobs"]["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.13"]
    assert "make lint" in text and "make test" in text


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_an_issue_form_is_one(path):
    """Mutation: a field without a label, or two of one name."""
    form = yaml.safe_load(path.read_text())
    if path.stem == "config":
        assert form.keys() == {"blank_issues_enabled", "contact_links"}
        return
    assert {"name", "description", "body"} <= form.keys()
    names = [field["id"] for field in form["body"]]
    assert len(set(names)) == len(names)
    for field in form["body"]:
        assert field["type"] in KINDS and field["attributes"]["label"]


def test_the_container_is_made_of_what_is_there():
    """Mutation: rename a folder that is copied, or forget one that the package is built from."""
    text = (ROOT / "Dockerfile").read_text()
    copied = [line.split()[1:-1] for line in text.splitlines() if line.startswith("COPY ")]
    names = {name for line in copied for name in line}
    assert all((ROOT / name).exists() for name in names)
    assert {"flowrl", "hydra_plugins", "conf", "pyproject.toml", "setup.py", "NOTICE"} <= names
    let_in = (ROOT / ".dockerignore").read_text().split()
    assert names == {line[1:] for line in let_in if line.startswith("!")}
    assert set(re.findall(r"^ARG (\w+)", text, re.MULTILINE)) == {"PYTHON", "TORCH_INDEX", "EXTRAS"}
    assert re.search(r'ENTRYPOINT \["flowrl"\]', text) and "USER flowrl" in text
