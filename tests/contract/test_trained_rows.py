"""Which rows of a micro-batch train on which steps, drawn once an iteration."""

from runs import make

from flowrl.training.sampling import sample_update

WORDS = ("num_iterations=2", "batch.updates_per_iteration=1", "batch.group_size=3")


class ByIteration:
    """Even samples train on the first stochastic step and odd ones on the second, and the other
    way round in every second iteration.
    """

    def __init__(self):
        self.drawn = []

    def candidates(self, stochastic):
        return tuple(stochastic[:2])

    def draw(self, stochastic, iteration, seed, prompt, sample):
        self.drawn.append((iteration, prompt, sample))
        return (stochastic[(iteration + sample) % 2],)


def test_each_sample_draws_once_an_iteration_however_many_terms_ask():
    """Mutation: draw at every question, or keep the last iteration's rows."""
    words = (*WORDS, "batch.max_micro_batch=3", "steps=all_but_last")
    policy, data, _ = make(*words)
    choice = ByIteration()
    object.__setattr__(policy.algorithm, "trained", choice)
    group_size = policy.plan.group_size
    for iteration, batch in zip(range(2), data.iterations, strict=False):
        choice.drawn.clear()
        parts = sample_update(policy, batch, 0, policy.plan.updates(0)[0])
        for part in parts:
            num_even = sum(row % group_size % 2 == 0 for row in part.rows)
            assert num_even != len(part.rows) - num_even
            expected = [num_even, len(part.rows) - num_even]
            if iteration == 1:
                expected.reverse()
            for _ in range(2):
                counts = [policy.objective.num_rows(part, index, 0) for index in range(2)]
                assert counts == expected
        members = [divmod(row, group_size) for part in parts for row in part.rows]
        assert choice.drawn == [(iteration, *member) for member in members]
