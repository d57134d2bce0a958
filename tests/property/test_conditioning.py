"""Rows of conditioning of any names, dtypes and shapes go into one batch and come out bitwise."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowrl.models.conditioning import COMPANION, concatenate, join, repeated, row_shapes, split
from flowrl.types import Conditioning

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool)


def content(shape, dtype, seed):
    """Numbers of any sign, none of which is 0, which padding consists of."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randint(1, 100, shape, generator=generator)
    sign = 2 * torch.randint(0, 2, shape, generator=generator) - 1
    return (sign * value).to(dtype)


@st.composite
def some_rows(draw, num_rows=None):
    """One to four rows of the same one to three names, each name with a dtype and a rank."""
    kinds = draw(
        st.dictionaries(
            st.sampled_from(["tokens", "pooled", "mask", "image latents"]),
            st.tuples(st.sampled_from(DTYPES), st.integers(0, 3)),
            min_size=1,
            max_size=3,
        )
    )
    rows = []
    for _ in range(num_rows or draw(st.integers(1, 4))):
        row = {}
        for name, (dtype, rank) in kinds.items():
            shape = [draw(st.integers(0, 3)) for _ in range(rank)]
            row[name] = content(shape, dtype, draw(st.integers(0, 2**31)))
        rows.append(row)
    return rows


def check_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert set(one) == set(other)
        for name, value in one.items():
            assert value.dtype == other[name].dtype and value.shape == other[name].shape
            assert torch.equal(value, other[name])


@given(rows=some_rows())
def test_split_undoes_join(rows):
    """Mutation: leave rows as long as the batch, cut another axis, or pad at the beginning."""
    check_equal(split(join(rows)), rows)


@given(rows=some_rows())
def test_a_companion_stands_only_where_shapes_differ(rows):
    """And beyond a row's true shape there is nothing but zeros. Mutation: write companions always,
    or leave what stood there.
    """
    joined = join(rows)
    for name in rows[0]:
        shapes = [tuple(row[name].shape) for row in rows]
        assert (name + COMPANION in joined.tensors) == (len(set(shapes)) > 1)
        assert row_shapes(joined, name) == shapes
        # What is not 0 is as much as the rows hold, none of whose numbers is 0.
        assert int((joined.tensors[name] != 0).sum()) == sum(row[name].numel() for row in rows)


@given(rows=some_rows(num_rows=4), order=st.permutations(range(4)), cut=st.integers(1, 3))
def test_parts_join_as_their_rows_do(rows, order, cut):
    """Whatever is taken of a padded batch, in any order, and joined again. Mutation: forget a
    part's companion, or keep its padding.
    """
    numbers = torch.tensor(order)
    whole = join(rows)
    parts = [whole[numbers[:cut]], whole[numbers[cut:]]]
    ours = concatenate(parts).tensors
    theirs = join([rows[number] for number in order]).tensors
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_batch_by_hand():
    """Texts of 2 and 1 tokens: the shorter is filled up by a zero. Mutation: a companion of the
    padded shape.
    """
    rows = [{"ids": torch.tensor([5, 6])}, {"ids": torch.tensor([7])}]
    joined = join(rows)
    assert joined.tensors["ids"].tolist() == [[5, 6], [7, 0]]
    assert joined.tensors["ids.shape"].tolist() == [[2], [1]]
    assert joined.tensors["ids.shape"].dtype == torch.int64
    shorter = concatenate([joined[1:], joined[1:]])
    assert shorter.tensors.keys() == {"ids"} and shorter.tensors["ids"].tolist() == [[7], [7]]
    assert join(rows[:1]).tensors.keys() == {"ids"}
    negative = Conditioning({"ids": torch.tensor([[1]])}, None)
    both = concatenate([repeated(negative, 2), joined])
    assert both.tensors["ids"].tolist() == [[1, 0], [1, 0], [5, 6], [7, 0]]
    assert both.tensors["ids.shape"].tolist() == [[1], [1], [2], [1]]


def test_rows_and_sizes_of_a_conditioning():
    """Rows of every tensor and of the negative. Mutation: keep the whole negative, or count it."""
    tensors = {"a": torch.arange(3), "b": torch.arange(6).reshape(3, 2) > 2}
    both = Conditioning(tensors, Conditioning(tensors))
    rows = both[torch.tensor([2, 0])]
    for one in (rows, rows.negative):
        assert one.tensors["a"].tolist() == [2, 0]
        assert one.tensors["b"].tolist() == [[True, True], [False, False]]
    assert (len(both), len(rows), both.nbytes) == (3, 2, 3 * 8 + 6)
    assert both.to(torch.device("meta")).negative.device.type == "meta"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: join([]), "no rows"),
        (lambda: join([{"a": torch.ones(2)}, {"b": torch.ones(2)}]), "different names"),
        (lambda: join([{"a": torch.ones(2)}, {"a": torch.ones(2, 1)}]), "'a' differ: .*1 axes"),
        (lambda: join([{"a": torch.ones(2)}, {"a": torch.ones(2).int()}]), "int32 of 1 axes"),
        (lambda: join([{"a.shape": torch.ones(2)}]), r"'a\.shape'"),
        (lambda: Conditioning({"a": torch.ones(2), "b": torch.ones(3)}), "equally many rows"),
        (lambda: Conditioning({}), "equally many rows"),
    ],
)
def test_what_cannot_be_joined_is_refused(call, message):
    """Mutation: join by position, convert without a word, or take a row for a companion."""
    with pytest.raises(ValueError, match=message):
        call()
