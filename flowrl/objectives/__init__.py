"""Training objectives by the kind of their loss, and the gate before the first update."""

from __future__ import annotations

from flowrl.algorithm import Algorithm
from flowrl.errors import UserError
from flowrl.losses.protocol import Loss
from flowrl.objectives.direct import DirectObjective
from flowrl.objectives.forward import ForwardObjective
from flowrl.objectives.protocol import Objective
from flowrl.objectives.reverse import ReverseObjective

OBJECTIVES: dict[str, type[Objective]] = {
    "reverse": ReverseObjective,
    "forward": ForwardObjective,
    "direct": DirectObjective,
}
"""The objective that evaluates losses of each kind."""


def check_method(algorithm: Algorithm) -> None:
    """Raise UserError where the parts of a method do not suit each other."""
    loss: object = algorithm.loss
    if not isinstance(loss, Loss) or getattr(loss, "kind", None) not in OBJECTIVES:
        raise UserError(
            f"loss={type(loss).__name__} is no ReverseLoss, ForwardLoss or DirectLoss of "
            "flowrl.losses.protocol; a function that was a loss becomes the __call__ of one"
        )
    if not isinstance(getattr(loss, "name", None), str):
        raise UserError(f"loss={type(loss).__name__} has no name; give its class one, for messages")
    OBJECTIVES[algorithm.loss.kind].check_method(algorithm)


def num_trained(algorithm: Algorithm, *, seed: int) -> int:
    """Count the steps or sigmas that each sample trains on in the first iteration."""
    return OBJECTIVES[algorithm.loss.kind].num_trained_of(algorithm, seed=seed)


def num_kept(algorithm: Algorithm) -> int:
    """Count the steps of a rollout whose states are kept, in the first iteration."""
    if algorithm.loss.kind == "direct":
        return 1
    stochastic = stochastic_steps(algorithm, iteration=0, seed=0, prompt=0)
    return len(algorithm.trained.candidates(stochastic))


def stochastic_steps(
    algorithm: Algorithm, *, iteration: int, seed: int, prompt: int
) -> tuple[int, ...]:
    """Return the stochastic steps of a method's rollouts for an iteration's `prompt`-th prompt."""
    objective = OBJECTIVES[algorithm.loss.kind]
    return objective.steps_of(algorithm, iteration=iteration, seed=seed, prompt=prompt)
