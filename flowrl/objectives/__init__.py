"""Training objectives by the kind of their loss, and the gate before the first update."""

from __future__ import annotations

from flowrl.algorithm import Algorithm
from flowrl.objectives.forward import ForwardObjective
from flowrl.objectives.reverse import ReverseObjective

OBJECTIVES: dict[str, type[ReverseObjective] | type[ForwardObjective]] = {
    "reverse": ReverseObjective,
    "forward": ForwardObjective,
}
"""The objective that evaluates losses of each kind."""


def check_method(algorithm: Algorithm) -> None:
    """Raise UserError where the parts of a method do not suit each other."""
    OBJECTIVES[algorithm.loss.kind].check_method(algorithm)


def stochastic_steps(
    algorithm: Algorithm, *, iteration: int, seed: int, prompt: int
) -> tuple[int, ...]:
    """Return the stochastic steps of a method's rollouts for an iteration's `prompt`-th prompt."""
    objective = OBJECTIVES[algorithm.loss.kind]
    return objective.steps_of(algorithm, iteration=iteration, seed=seed, prompt=prompt)
