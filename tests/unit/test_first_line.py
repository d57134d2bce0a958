"""What is told of a library's error: its first line, or what it is where it says nothing."""

import pytest

from flowrl.errors import first_line


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("one"), "one"),
        (ValueError("\n one \ntwo"), "one "),
        (OSError(), "OSError"),
        (RuntimeError("  "), "RuntimeError"),
    ],
)
def test_an_error_without_text_is_told_by_its_type(error, told):
    """Mutation: take the first line of none, which fails within the handler of an error."""
    assert first_line(error) == told
