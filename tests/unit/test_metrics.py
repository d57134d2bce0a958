import ast

import pytest

from flowrl.runs import glossary
from flowrl.runs.readings import READINGS


def test_a_star_is_exactly_one_segment():
    """Mutation: match a prefix, or let the star span slashes."""
    known = ["reward/mean", "reward/part/strict", "eval/held_in/reward", "eval/x/family/binding"]
    unknown = [
        "reward",
        "reward/meen",
        "reward/part",
        "reward/part/a/b",
        "eval/reward",
        "eval/x/family",
    ]
    assert [glossary.is_known(name) for name in known + unknown] == [True] * 4 + [False] * 6


def test_unknown_names_are_all_listed():
    """Mutation: report the first only, or warn."""
    glossary.check(["iteration", "loss/policy"])
    with pytest.raises(KeyError, match="b/c, loss/polizy"):
        glossary.check(["loss/polizy", "iteration", "b/c"])


def test_every_name_in_the_package_is_in_the_glossary(root):
    """Each literal like trust/kl_old outside glossary.py. Mutation: rename a glossary entry."""
    families = {name.split("/")[0] for name in glossary.GLOSSARY if "/" in name} - {"eval"}
    used = {
        node.value
        for path in (root / "flowrl").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if node.value.split("/")[0] in families
        and node.value.count("/") == 1
        and " " not in node.value
        if not node.value.endswith("/")
    }
    assert len(used) > 15
    glossary.check(used)


def test_the_page_is_current(root):
    """Mutation: change the glossary without `make docs`."""
    assert (root / "docs" / "metrics.md").read_text() == glossary.page()


def test_every_metric_says_what_to_make_of_it():
    """Mutation: rename a metric in the glossary alone."""
    assert set(READINGS) == set(glossary.GLOSSARY)
