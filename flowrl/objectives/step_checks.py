"""Checks of the steps that a method makes stochastic and trains on."""

from __future__ import annotations

from typing import cast

from flowrl.algorithm import Algorithm, sampler_option
from flowrl.errors import UserError
from flowrl.losses.protocol import DirectLoss, ReverseLoss
from flowrl.samplers.protocol import HasPublishedStd
from flowrl.samplers.steps import Branch
from flowrl.schedule import PipelineGrid

MIN_STEP_STD = 0.01
"""Steps with a smaller std are refused: their log-probabilities overwhelm all others.

Such are the last step, and the second-to-last on diffusers' default grid.
"""


def check_guidance_of_updates(algorithm: Algorithm) -> None:
    """Raise UserError where updates that pass through a rollout's own steps would have another
    guidance scale than these.
    """
    if algorithm.scale_of_updates != algorithm.guidance_scale:
        raise UserError(
            f"rollout.training_guidance_scale={algorithm.scale_of_updates:g} is not "
            f"rollout.guidance_scale={algorithm.guidance_scale:g}, but loss={algorithm.loss.name} "
            "passes through the rollout's own steps again: leave it out, or set "
            "penalty.guidance_scale, that of the reference alone"
        )


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
    if loss.looks_back and len(stochastic) < 2:
        raise UserError(
            f"loss={loss.name} looks back over the stochastic steps of a sample, but steps makes "
            f"{len(stochastic)} of them: choose more, as steps=all_but_last does, or loss=dppo"
        )


def check_branches(algorithm: Algorithm) -> None:
    """Raise UserError where samples that are to part at one step have parted before it."""
    if isinstance(algorithm.steps, Branch) and not algorithm.shared_initial_noise:
        raise UserError(
            "steps=branch lets the samples of a prompt part at one step, but with "
            "rollout.shared_initial_noise=false they differ from the start: set it to true, or "
            "choose another option of steps"
        )


def check_last_step(algorithm: Algorithm) -> None:
    """Raise UserError where a loss would train the last step alone, or noise samples to it, and
    this step begins so near the data that neither changes an image.
    """
    schedule = algorithm.schedule
    loss = cast(DirectLoss, algorithm.loss)
    if loss.last_steps > 1 or (isinstance(schedule, PipelineGrid) and schedule.is_open):
        return  # an open grid is asked about again once the model's is known
    sigma = algorithm.intervals[-1].sigma
    if sigma < MIN_STEP_STD:
        raise UserError(
            f"loss.last_steps=1 trains the last of rollout.num_steps={algorithm.num_steps} alone, "
            f"which begins at sigma {sigma:.2g} < {MIN_STEP_STD}: a change of the velocity there "
            f"hardly changes an image, nor do the noises of loss.num_noises={loss.num_noises}; "
            "choose schedule=linear_shift, or a higher loss.last_steps with loss.num_noises=0"
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
