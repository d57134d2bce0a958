import pytest

from flowrl.training.learning_rate import constant, cosine


def test_cosine_by_hand():
    """1 at the start, (1 + final) / 2 half-way, final at the end. Mutation: a whole cosine, or
    final added on top.
    """
    factors = [cosine(progress, final=0.2) for progress in (0.0, 1 / 3, 0.5, 1.0)]
    assert factors == pytest.approx([1, 0.8, 0.6, 0.2])


def test_constant():
    """Mutation: let it fall."""
    assert {constant(progress) for progress in (0.0, 0.5, 0.99)} == {1.0}
