"""GenEval's tasks, read from the metadata of prompts."""

import pytest
from geneval_cases import BESIDE, CUPS, entry

from flowrl.errors import UserError
from flowrl.rewards.geneval_task import (
    Clause,
    Task,
    read_task,
)
from flowrl.types import Prompt


def test_a_task_is_read():
    """Positions come as lists from JSON. Mutation: lose the exclusion, or the target's number."""
    assert read_task(CUPS) == Task("counting", (Clause("cup", 3),), (Clause("cup", 4),))
    assert read_task(BESIDE).include[1] == Clause("cat", 1, None, "left of", 0)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, "its metadata lack `tag` or `include`, as data=geneval has them"),
        ({"tag": "position"}, "its metadata lack `tag` or `include`"),
        ({"tag": "style", "include": [entry("dog")]}, "tag='style' is none of single_object"),
        ({"tag": ["colors"], "include": [entry("dog")]}, "is none of single_object"),
        ({"tag": "colors", "include": []}, "`include` names no object"),
        ({"tag": "colors", "include": "dog"}, "`include` is no list"),
        ({"tag": "colors", "include": ["dog"]}, r"include\[0\] is no object with a `class`"),
        ({"tag": "colors", "include": [entry("dog", 0)]}, "count=0 is no whole number"),
        ({"tag": "colors", "include": [entry("dog", True)]}, "count=True is no whole number"),
        ({"tag": "colors", "include": [entry("dog", color="teal")]}, "color='teal' is none of red"),
        ({"tag": "position", "include": [entry("dog", position=["near", 0])]}, "is no pair of"),
        ({"tag": "position", "include": [entry("dog", position=["above", 0])]}, "an earlier entry"),
        ({"tag": "counting", "include": [entry("dog")], "exclude": [{}]}, r"exclude\[0\] is no"),
    ],
)
def test_other_metadata_are_refused_in_one_line(metadata, words):
    """Mutation: take an unknown tag for one that is not counting."""
    with pytest.raises(UserError, match=words) as caught:
        read_task(Prompt("a photo", "", metadata))
    assert str(caught.value).startswith("prompt 'a photo': ")
    assert "\n" not in str(caught.value)
