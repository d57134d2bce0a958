import pytest

from flowrl.training.prompt_data import Iterations, PromptData
from flowrl.types import Prompt

PROMPTS = [Prompt(str(i)) for i in range(7)]


def build(seed=0, num_iterations=14, prompts_per_iteration=3):
    return PromptData(
        prompts=PROMPTS,
        prompts_per_iteration=prompts_per_iteration,
        num_iterations=num_iterations,
        seed=seed,
    )


def texts(data):
    return [[prompt.text for prompt in batch.prompts] for batch in data.train_dataloader()]


def test_every_pass_is_a_permutation_in_a_new_order():
    """3 prompts at a time over 7, across the seams. Mutation: reshuffle at every iteration, or drop
    the remainder.
    """
    flat = [text for batch in texts(build()) for text in batch]
    passes = [flat[i : i + 7] for i in range(0, 42, 7)]
    assert all(sorted(one) == sorted(p.text for p in PROMPTS) for one in passes)
    assert len({tuple(one) for one in passes}) > 1


def test_a_resumed_run_sees_the_same_iterations():
    """Mutation: restart the order at start_iteration, or number iterations from 0 again."""
    whole, rest = build(), build()
    rest.start_iteration = 5
    assert texts(rest) == texts(whole)[5:]
    assert [batch.iteration for batch in rest.train_dataloader()] == list(range(5, 14))


def test_an_iteration_does_not_depend_on_what_was_asked_before():
    """Mutation: draw orders from a running generator."""
    forwards, backwards = Iterations(PROMPTS, 3, 14, 0), Iterations(PROMPTS, 3, 14, 0)
    assert [forwards[i] for i in range(14)] == [backwards[i] for i in range(13, -1, -1)][::-1]


def test_the_seed_counts():
    """Mutation: leave the seed out of the shuffle."""
    assert texts(build(seed=1)) != texts(build(seed=2))


def test_a_run_has_an_iteration():
    """Mutation: drop the check."""
    with pytest.raises(ValueError, match="num_iterations=0"):
        build(num_iterations=0)
