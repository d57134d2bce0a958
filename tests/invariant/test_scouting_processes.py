"""Scouting in several processes."""

import numpy as np
from parallel import run
from test_world_size import assert_equal_runs, union

WORDS = (
    *("scouting=best_worst", "scouting.candidates=6", "scouting.num_steps=4"),
    *("rollout.shared_initial_noise=false", "batch.max_micro_batch=2", "num_iterations=2"),
)
"""Three micro-batches of two candidates a prompt, whatever the number of processes."""


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
