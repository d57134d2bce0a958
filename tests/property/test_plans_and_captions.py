import random
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from flowrl.shapes.grammar import FAMILIES, MAX_OBJECTS, corrupt, parse, sample_caption
from flowrl.training.batch_plan import BatchPlan

counts = st.integers(1, 6)


@given(
    prompts=counts,
    group=st.integers(2, 6),
    updates=counts,
    processes=st.integers(1, 4),
    micro=st.integers(1, 40),
)
def test_machines_only_slice_the_plan(prompts, group, updates, processes, micro):
    """Each update is the same contiguous samples, each once, on any machine; micro-batches are
    equal and fit.

    Mutation: interleave ranks, lose a remainder, or exceed max_micro_batch.
    """
    assume(prompts * group % (updates * processes) == 0)
    plan = BatchPlan(
        prompts_per_iteration=prompts,
        group_size=group,
        updates_per_iteration=updates,
        inner_epochs=1,
        max_micro_batch=micro,
        num_processes=processes,
    )
    ranks = [plan.updates(rank) for rank in range(processes)]
    assert {len(rows) for rank in ranks for update in rank for rows in update} == {plan.micro_batch}
    assert plan.micro_batch <= micro
    alone = replace(plan, num_processes=1, max_micro_batch=10**6).updates(0)
    for u, update in enumerate(alone):
        assert [row for rank in ranks for rows in rank[u] for row in rows] == [
            row for rows in update for row in rows
        ]
    assert [row for update in alone for rows in update for row in rows] == list(
        range(prompts * group)
    )


captions = st.builds(
    lambda family, seed: sample_caption(family, random.Random(seed)),
    st.sampled_from(FAMILIES),
    st.integers(0, 10**6),
)


@given(caption=captions)
def test_a_caption_can_be_read_back(caption):
    """Mutation: a plural without its s, `and` split before a relation, a lost colour."""
    assert parse(caption.text) == caption
    assert parse(caption.text).family == caption.family


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_what_was_asked_for(family):
    """Mutation: classify `a red circle above a square` as position."""
    drawn = [sample_caption(family, random.Random(seed)) for seed in range(300)]
    assert {caption.family for caption in drawn} == {family}
    assert max(caption.num_objects for caption in drawn) <= MAX_OBJECTS
    assert len({caption.text for caption in drawn}) >= 4


KEYS = ("caption", "colour", "shape", "count", "relation")


@given(caption=captions, seed=st.integers(0, 10**6))
def test_corruption_at_rate_0_and_1(caption, seed):
    """Rate 0 changes nothing, rate 1 every word of its kind, and only that. Mutation: draw the same
    word again.
    """
    rng = random.Random(seed)
    assert corrupt(caption, dict.fromkeys(KEYS, 0.0), rng) == caption
    for key in ("colour", "shape", "count"):
        changed = corrupt(caption, {**dict.fromkeys(KEYS, 0.0), key: 1.0}, rng)
        for before, after in zip(caption.phrases, changed.phrases, strict=True):
            assert replace(after, **{key: getattr(before, key)}) == before
            has_no_other = key == "count" and changed.num_objects == MAX_OBJECTS
            assert (
                getattr(after, key) != getattr(before, key)
                or getattr(before, key) is None
                or has_no_other
            )
        assert changed.num_objects <= MAX_OBJECTS
        assert changed.relation == caption.relation
    swapped = corrupt(caption, {**dict.fromkeys(KEYS, 0.0), "relation": 1.0}, rng)
    assert swapped.phrases == caption.phrases
    assert (swapped.relation != caption.relation) == (caption.relation is not None)


def test_a_caption_is_replaced_whole_at_its_own_rate():
    """Mutation: ignore the rate, or keep the family."""
    rng = random.Random(0)
    caption = parse("a red circle left of a blue square")
    changed = [
        corrupt(caption, {**dict.fromkeys(KEYS, 0.0), "caption": 0.3}, rng) for _ in range(2000)
    ]
    replaced = [other for other in changed if other != caption]
    assert 0.26 < len(replaced) / len(changed) < 0.34
    assert {other.family for other in replaced} == set(FAMILIES)
