"""What scripts/structure.py counts, on a module small enough to count by hand."""

import ast

import pytest
from runs import load_script

SOURCE = '''"""Rooms of a house."""

# Why, not what.
def choose(values, key):  # noqa: D103
    """Of all values."""
    if key and values:
        return [value for value in values if value > 0]
    return values if key else None


class Policy:
    """A policy with one method."""

    def act(self):
        return 1
'''


@pytest.fixture(scope="module")
def structure():
    return load_script("structure")


def test_branches_inside_expressions_count(structure):
    """One way in, if, and, comprehension, its condition, conditional expression. Mutation: count
    statements alone.
    """
    function = ast.parse(SOURCE).body[1]
    assert structure.branches(function) == 6


def test_a_module_by_hand(structure):
    """Mutation: count directives as comments, take a phrase for a fragment, or lose the class's
    lines or methods.
    """
    table = structure.measure(
        {"flowrl/training/policy.py": SOURCE, "flowrl/hall.py": "x = isinstance(loss, DPPO)\n"}
    )
    assert table["modules"] == 2 and table["modules in the hall"] == 1
    assert (table["lines of Policy"], table["methods of Policy"]) == (5, 1)
    assert table["questions for a loss's class"] == 1
    assert (table["docstrings"], table["docstrings that are fragments"]) == (3, 1)
    assert table["words a docstring"] == pytest.approx((4 + 3 + 5) / 3)
    assert table["comments per 100 lines"] == pytest.approx(100 / 16)


def test_tokens_of_functions_by_hand(structure):
    """Their docstrings left out; a name that stands twice is nobody's. Mutation: count the
    docstring, or take the first of two.
    """
    twice = "def act(self):\n    pass\n" * 2
    counts = structure.function_tokens({"flowrl/a.py": SOURCE, "flowrl/b.py": twice})
    # Its head has 6 tokens, its return 2.
    assert counts.pop(("Policy", "act")) == 8
    # The head 8, if 5, the comprehension's line 12, the last one 6.
    assert counts == {("", "choose"): 31}


LIMITS = {
    "modules in the hall": 10,
    "lines of Policy": 190,
    "methods of Policy": 14,
    "questions for a loss's class": 0,
    "docstrings that are fragments": 10,
    "tokens a line": 5.55,
    "functions above 10 branches": 10,
}
"""What the package holds at most; tokens a line are told with one digit, 5.5."""


def test_the_package_stays_within_its_limits(structure):
    """Mutation: write a few docstrings as fragments, or a few functions with a branch more."""
    table = structure.measure(structure.tree_sources())
    assert {name: table[name] for name in LIMITS if table[name] > LIMITS[name]} == {}
