"""Scouting in several processes."""

import numpy as np
import pytest
from parallel import run
from test_world_size import assert_equal_runs, union

SCOUTED = ("scouting=best_worst", "scouting.candidates=6")
OWN_NOISE = "rollout.shared_initial_noise=false"
WORDS = (*SCOUTED, "scouting.num_steps=4", OWN_NOISE)
WORDS += ("batch.max_micro_batch=2", "num_iterations=2")
"""Three micro-batches of two candidates a prompt, whatever the number of processes."""
WHOLE = ("scouting.num_steps=6", "num_iterations=2")
"""Candidates that take all steps of a rollout."""
METHODS = {
    "noise in two steps": (*SCOUTED, *WHOLE, "steps.count=2", OWN_NOISE, "batch.max_micro_batch=4"),
    # Two divides both 6 candidates and 4 samples, so that no micro-batch has two starts.
    "one start a prompt": (*SCOUTED, *WHOLE, "steps.count=2", "batch.max_micro_batch=2"),
    "no noise": ("experiment=sol_rl", "scouting.candidates=6", *WHOLE, "batch.max_micro_batch=4"),
}


def test_processes_come_to_the_same_choice():
    """Two processes draw the candidates that one draws, each its half of them, and train on the
    same; in the first iteration rewards are equal bitwise.

    Mutation: choose among a process's own candidates, or put those of the second before the first.
    """
    [alone] = run(1, *WORDS)
    seen = run(2, *WORDS)
    assert_equal_runs(seen, alone)
    everyone = {(prompt, number) for prompt in range(4) for number in range(6)}
    assert {sample for iteration, sample in alone.noise if iteration == 0} == everyone
    rewards = union(seen, "rewards")
    first = {key: value for key, value in alone.rewards.items() if key[0] == 0}
    assert len(first) == 16 and first == {key: rewards[key] for key in first}
    assert all(own.metrics == seen[0].metrics for own in seen)
    for name in ("reward_mean", "reward_std", "agreement", "constant_groups", "missing"):
        key = f"scouting/{name}"
        ours = [row[key] for row in seen[0].metrics]
        np.testing.assert_allclose(ours, [row[key] for row in alone.metrics], rtol=1e-5)


def first_of(table):
    """The entries of the first iteration, after which weights differ by rounding."""
    return {key: value for key, value in table.items() if key[0] == 0}


@pytest.mark.parametrize("method", METHODS)
def test_candidates_come_again_bitwise_in_one_process_and_in_two(method):
    """Last states and images of what is trained on are, in every iteration, those of the candidates
    with the same numbers, which the other process may have drawn; and while weights are equal, in
    the first one, choice, states, images and rewards are those of a single process. Micro-batches
    have one size throughout.

    Mutation: split candidates into micro-batches of another size than that of rollouts.
    """
    [alone] = run(1, *METHODS[method])
    two = run(2, *METHODS[method])
    for seen in ([alone], two):
        candidates = union(seen, "candidates")
        trained = union(seen, "trained")
        assert len(candidates) == 2 * 4 * 6 and len(trained) == 2 * 4 * 4
        assert trained == {sample: candidates[sample] for sample in trained}
    assert any(sample not in own.candidates for own in two for sample in own.trained)
    for name in ("candidates", "trained", "rewards", "advantages"):
        assert first_of(union(two, name)) == first_of(getattr(alone, name)), name


def test_candidates_of_fewer_steps_lead_two_processes_to_what_one_trains_on():
    """Sol-RL as it is configured, whose candidates are not what is drawn again.

    Mutation: draw what is trained on by its place in the group.
    """
    words = ("experiment=sol_rl", "scouting.candidates=6", "num_iterations=1")
    words += ("batch.max_micro_batch=4",)
    [alone] = run(1, *words)
    two = run(2, *words)
    assert len(alone.candidates) == 4 * 6 and len(alone.trained) == 4 * 4
    assert not set(alone.trained.values()) & set(alone.candidates.values())
    assert {number for _, _, number in alone.trained} > {4}, "beyond the places of the group"
    for name in ("candidates", "trained", "rewards", "advantages"):
        assert union(two, name) == getattr(alone, name), name
