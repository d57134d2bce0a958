"""Checks of the steps that a method makes stochastic and trains on."""

from __future__ import annotations

from typing import cast

from flowrl.algorithm import Algorithm, sampler_option
from flowrl.errors import UserError
from flowrl.losses.protocol import ReverseLoss
from flowrl.samplers.protocol import HasPublishedStd
from flowrl.schedule import PipelineGrid

MIN_STEP_STD = 0.01
"""Steps with a smaller std are refused: their log-probabilities overwhelm all others.

Such are the last step, and the second-to-last on diffusers' default grid.
"""


def check_penalty(algorithm: Algorithm) -> None:
    """Raise UserError where the published penalty is asked of a sampler that has none."""
    penalty = algorithm.penalty
    is_published = penalty.beta > 0 and penalty.form == "flow_grpo"
    if is_published and not isinstance(algorithm.sampler, HasPublishedStd):
        kind = type(algorithm.sampler).__name__
        raise UserError(
            f"penalty.form=flow_grpo needs a sampler that says by published_std what its published "
            f"penalty divides by, which {kind} does not: choose penalty=kl, or give {kind} that "
            "method"
        )


def check_number(algorithm: Algorithm, number: int) -> None:
    """Raise UserError where a step that may be stochastic is none of the grid's."""
    num_steps = algorithm.num_steps
    if number >= num_steps:
        raise UserError(
            f"steps may pick step {number}, but the last of rollout.num_steps={num_steps} is step "
            f"{num_steps - 1}; lower steps.high"
        )


def check_trained(algorithm: Algorithm, stochastic: tuple[int, ...]) -> None:
    """Raise UserError where what is drawn to be trained on is nothing, or not what may be."""
    candidates = algorithm.trained.candidates(stochastic)
    drawn = algorithm.trained.draw(stochastic, 0, 0, 0, 0)
    if not drawn or not set(drawn) <= set(candidates) <= set(stochastic):
        raise UserError(
            f"trained: {drawn} were drawn of {candidates}, where {stochastic} are stochastic; a "
            "sample must train on one or more steps of those that may be trained, and these must "
            "be stochastic"
        )
    if algorithm.credit == "step" and set(candidates) != set(stochastic):
        raise UserError(
            "rollout.credit=step needs the states of all stochastic steps, but trained keeps those "
            f"of {candidates} among {stochastic}: choose trained=all"
        )
    loss = cast(ReverseLoss, algorithm.loss)
    if loss.looks_back and set(drawn) != set(stochastic):
        raise UserError(
            f"loss={loss.name} looks back over all stochastic steps of a sample, but each trains "
            f"on {len(drawn)} of {len(stochastic)}: choose trained=all"
        )


def check_step(algorithm: Algorithm, number: int) -> None:
    """Raise UserError where a step that may be trained on has no noise, or hardly any."""
    num_steps = algorithm.num_steps
    sampler = sampler_option(algorithm.sampler)
    schedule = algorithm.schedule
    if isinstance(schedule, PipelineGrid) and schedule.is_open:
        return  # this is asked again once the model's grid is known
    std = algorithm.sampler.std(algorithm.intervals[number])
    if std == 0 and number < num_steps - 1:
        raise UserError(
            f"sampler={sampler} is deterministic (std 0 at step {number}), but the loss needs a "
            "stochastic step: choose sampler=cps or sampler=flow_sde with sampler.noise_level "
            "above 0, or loss=nft"
        )
    if std < MIN_STEP_STD:
        raise UserError(
            f"steps may pick step {number} of rollout.num_steps={num_steps}, where "
            f"sampler={sampler} has std {std:.2g} < {MIN_STEP_STD}: a zero-variance step is never "
            "trained on; lower steps.high or use steps=all_but_last"
        )
