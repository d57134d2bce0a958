"""Lists of texts in data that others wrote, and values by the beginnings of their names."""

from flowrl.values.named import below
from flowrl.values.texts import are_pairs, are_texts


def test_lists_of_texts():
    """Lists or tuples, and no text, which to Python is a sequence of texts.

    Mutation: take a word for a list of its letters.
    """
    for value in ([], ["one"], ("one", "two")):
        assert are_texts(value), value
    for value in ("one", ["one", 2], {"one": "two"}, None):
        assert not are_texts(value), value


def test_pairs_of_texts():
    """Mutation: take three texts for a pair, or a word of two letters."""
    for value in ([], [["one", "two"]], (("one", "two"), ["three", "four"])):
        assert are_pairs(value), value
    for value in (
        [["one", "two", "three"]],
        [["one", 2]],
        ["ab"],
        "ab",
        [["one", "two"], []],
        None,
    ):
        assert not are_pairs(value), value


def test_values_below_a_prefix():
    """Mutation: keep the prefix, or take names that only hold it."""
    assert below({"a/x": 1, "b/a/x": 2, "a/a/y": 3, "ab": 4}, "a/") == {"x": 1, "a/y": 3}
