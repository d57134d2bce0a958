"""What a pipeline's methods return is taken apart and put together again, for any rows."""

import pytest
import torch

from flowrl.errors import UserError
from flowrl.models.conditioning import join
from flowrl.models.derived.trees import LAYOUT, find_axes, flatten, groups, read, to_tensor
from flowrl.models.derived.trees import unflatten as put_together


def result(texts):
    """A made-up method's: embeddings, one list entry a row, rows on the second axis, a table for
    all, and plain values.
    """
    lengths = [len(text) for text in texts]
    longest = max(lengths)
    embeds = torch.zeros(len(texts), longest, 2)
    for row, length in enumerate(lengths):
        embeds[row, :length] = length
    entries = [torch.full((length, 3), float(length)) for length in lengths]
    layers = torch.tensor(lengths, dtype=torch.float32).expand(4, -1).clone()
    return embeds, entries, {"layers": layers, "ids": torch.arange(longest)}, None, 7, "word"


def rows_of(texts):
    axes = find_axes(result(["ab"]), result(["ab", "ab"]), "m.0")
    rows = []
    for text in texts:
        tensors = {}
        layout = flatten(result([text]), "m.0", axes, tensors)
        rows.append({**tensors, LAYOUT: to_tensor(layout)})
    return join(rows)


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one == other


def test_rows_of_one_length_come_back_as_one_call_gives_them():
    """Mutations: stack along the first axis always, share the entries, or keep the padding."""
    conditioning = rows_of(["abc", "abc", "abcde", "xyz"])
    numbers = groups(conditioning.tensors[LAYOUT])
    assert list(numbers.values()) == [[0, 1, 3], [2]]
    for (text, rows), texts in zip(
        numbers.items(), (["abc", "abc", "xyz"], ["abcde"]), strict=True
    ):
        some = conditioning[torch.tensor(rows)].tensors
        assert same(put_together(read(text), some), result(texts))


def test_rows_that_disagree_in_what_they_share_are_apart():
    """Mutation: leave the digest out of the layout."""
    axes = {"m": None}
    layouts = []
    for value in (1.0, 2.0, 1.0):
        layouts.append({"a": to_tensor(flatten(torch.tensor([value]), "m", axes, {}))})
    assert list(groups(join(layouts).tensors["a"]).values()) == [[0, 2], [1]]


@pytest.mark.parametrize(
    ("one", "two", "reason"),
    [
        (torch.zeros(1, 4), torch.zeros(2, 8), "no axis is the rows'"),
        (torch.zeros(2, 4), torch.zeros(4, 4), "no axis is the rows'"),
        (torch.zeros(4), None, "no axis is the rows'"),
        (torch.zeros(2), torch.zeros(3), "no axis is the rows', as of a running sum over rows"),
        ((1, 2), (1, 2, 3), "2 values for a row and 3 for two"),
    ],
)
def test_what_has_no_rows_is_refused(one, two, reason):
    """Two in one and four in two may be pairs or halves, so which is whose is not known. Mutation:
    take the first axis that differs.
    """
    with pytest.raises(UserError, match=reason):
        find_axes(one, two, "m")


def test_what_cannot_be_kept_is_refused():
    """Mutation: keep its text."""
    with pytest.raises(UserError, match="m is a device, which cannot be recorded"):
        flatten(torch.device("cpu"), "m", {}, {})
    with pytest.raises(UserError, match="a tensor for some prompts alone"):
        flatten(torch.zeros(1), "m", {}, {})
