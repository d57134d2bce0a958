"""Bounds that stand in hints hold for objects that are made in code, too."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import pytest

from flowrl.errors import UserError
from flowrl.models.quantization import KINDS
from flowrl.models.weights import DTYPES
from flowrl.prompts.subsets import WAYS
from flowrl.values.bounds import Count, Dtype, Quantization, Share, Subset
from flowrl.values.check import check_fields, checked


@dataclass
class Options:
    share: Share
    kind: Literal["a", "b"]
    sizes: Sequence[int] = (1, 2)
    other: Any = None

    def __post_init__(self):
        check_fields(self, "options")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"share": 1.5, "kind": "a"},
            "options.share=1.5 must be a number of at least 0",
        ),
        ({"share": float("nan"), "kind": "a"}, "options.share=nan must be a number"),
        ({"share": True, "kind": "a"}, "options.share=true must be a number"),
        ({"share": 1, "kind": "c"}, "options.kind=c must be a or b"),
        ({"share": 1, "kind": "a", "sizes": (1, "x")}, r"options.sizes=\[1, x\] must be a list"),
    ],
)
def test_fields_are_compared_with_their_hints(fields, message):
    """Mutation: leave out the comparison."""
    with pytest.raises(UserError, match=message):
        Options(**fields)


def test_values_in_their_bounds_are_taken():
    """Mutation: refuse tuples, which code hands over where YAML has lists."""
    Options(share=0, kind="b", sizes=(3,), other=object())
    Options(share=1.0, kind="b", sizes=[3], other=[])


def test_arguments_are_compared_with_their_hints():
    """Mutation: bind without keyword arguments."""

    class Scorer:
        @checked("reward")
        def __init__(self, name: str, *, batch_size: Count = 4):
            self.size = batch_size

    assert Scorer("x").size == 4
    with pytest.raises(UserError, match=r"reward.batch_size=0 must be a whole number"):
        Scorer("x", batch_size=0)

    @checked("")
    def draw(count: Count) -> int:
        return count

    assert draw(3) == 3
    with pytest.raises(UserError, match=r"^count=-1 must be"):
        draw(-1)


@pytest.mark.parametrize(
    ("words", "table"),
    [(Dtype, DTYPES), (Quantization, KINDS), (Subset, WAYS)],
)
def test_words_of_the_configuration_are_those_of_their_tables(words, table):
    """Mutation: a word that no table knows, or a kind that no configuration may name."""
    assert set(get_args(words)) == set(table)
