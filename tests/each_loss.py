"""Each loss of conf/loss with a method that suits it, and samples for it."""

import dataclasses
from functools import cache

import pytest
import torch
from hydra.utils import instantiate
from runs import CONF, composed

from flowrl.algorithm import Algorithm
from flowrl.errors import UserError
from flowrl.objectives import check_method
from flowrl.objectives.reverse import loss_inputs
from flowrl.types import ForwardInputs, Trajectory

EVERY = sorted(path.stem for path in (CONF / "loss").glob("*.yaml"))
DIRECT = ("draft",)
"""Losses of rewards, which see neither advantages nor velocities; tests/unit/test_draft.py has
theirs.
"""
OPTIONS = [option for option in EVERY if option not in DIRECT]
SAMPLERS = sorted(path.stem for path in (CONF / "sampler").glob("*.yaml"))
VARIANTS = {
    "awm": (
        ("loss.weighting=uniform",),
        ("loss.weighting=sigma_squared",),
        ("loss.weighting=generalised_huber",),
    ),
    "dgpo": (("loss.anchor=old",), ("loss.clip_low=1e-3", "loss.clip_high=1e-3")),
    "dppo": (
        ("loss.delta=auto", "loss.kl_budget=1e-5"),
        ("loss.delta=1e-4", "loss.final_delta=1e-6"),
        ("loss.divergence=tv", "loss.calibrated_for=tv"),
        ("loss.divergence=velocity", "loss.calibrated_for=velocity"),
        ("likelihood.reduction=sum", "loss.calibrated_for=sum_kl"),
    ),
    "flow_dpo": (
        ("loss.anchor=old",),
        ("loss.weighting=one_minus_sigma_squared",),
    ),
    "forward_dppo": (
        ("loss.weighting=uniform",),
        ("loss.weighting=sigma_squared",),
    ),
    "grpo": (("likelihood.reduction=sum", "loss.calibrated_for=sum_gaussian"),),
    "opd": (("likelihood.reduction=sum",),),
    "nft": (("loss.beta=0.1",),),
}
"""Overrides under which an option computes or keeps something else."""
CASES = [(option, *more) for option in OPTIONS for more in ((), *VARIANTS.get(option, ()))]
ADVANTAGES = (1.5, -0.5, 2.0, -3.0)
GROUP_SIZE = 2
"""Samples of a prompt, for losses that compare them: a better one and a worse one."""
BY_RANK = ("flow_dpo",)
"""Losses that look at the order of advantages and not at their size."""


@cache
def method(option, *overrides):
    """The method of a loss's option, with the first sampler that suits it."""
    refusals = []
    for sampler in SAMPLERS:
        cfg = composed(f"loss={option}", f"sampler={sampler}", "penalty=none", *overrides)
        algorithm = instantiate(cfg.algorithm)
        assert isinstance(algorithm, Algorithm)
        try:
            check_method(algorithm)
        except UserError as error:
            refusals.append(str(error))
        else:
            return algorithm
    raise AssertionError(refusals)


@dataclasses.dataclass
class Samples:
    """Samples at one step or sigma: what a loss's inputs are made of. The velocity is a leaf; the
    reference's is the old one.
    """

    x: torch.Tensor
    x0: torch.Tensor
    noise: torch.Tensor
    velocity: torch.Tensor
    old_velocity: torch.Tensor
    advantage: torch.Tensor
    group: torch.Tensor

    def __getitem__(self, rows):
        """The samples of these rows, with a velocity of their own."""
        chosen = {name: value.detach()[rows] for name, value in vars(self).items()}
        chosen["velocity"] = chosen["velocity"].clone().requires_grad_()
        return Samples(**chosen)

    def replace(self, **changes):
        return dataclasses.replace(self[:], **changes)


def draw(distance, advantage=ADVANTAGES, dtype=torch.float64):
    """Samples whose velocity is `distance` times a normal one away from the old one."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(advantage), 2, 3, 3)
    x, x0, noise, old_velocity, moved = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(5)
    )
    velocity = (old_velocity + distance * moved).requires_grad_()
    group = torch.arange(len(advantage)) // GROUP_SIZE
    return Samples(
        x, x0, noise, velocity, old_velocity, torch.tensor(advantage, dtype=dtype), group
    )


def inputs_of(algorithm, samples, is_used=None):
    """The inputs that the objective of a loss's kind makes of samples."""
    if algorithm.loss.kind == "forward":
        sigma = algorithm.intervals[1].sigma
        if is_used is None:
            is_used = torch.ones(len(samples.x0), dtype=torch.bool)
        return ForwardInputs(
            x0=samples.x0,
            x=torch.lerp(samples.x0, samples.noise, sigma),
            sigma=samples.x0.new_full((len(samples.x0),), sigma),
            velocity=samples.velocity,
            old_velocity=samples.old_velocity,
            advantage=samples.advantage,
            is_used=is_used,
            ref_velocity=samples.old_velocity if algorithm.needs_reference else None,
            group=samples.group,
            group_size=GROUP_SIZE,
        )
    interval = algorithm.intervals[1]
    old_step = algorithm.sampler.step(samples.x, samples.old_velocity, interval)
    x_next = old_step.sample(samples.noise)
    states = (value[:, None] for value in (samples.x, x_next, old_step.mean))
    step = algorithm.sampler.step(samples.x, samples.velocity, interval)
    inputs = loss_inputs(
        algorithm, step, Trajectory((1,), False, *states, x_next), 0, samples.advantage
    )
    if algorithm.loss.compares:
        moved = (samples.velocity - samples.old_velocity).flatten(1)
        ratio = -moved.square().mean(1) - 2 * (moved * samples.x0.flatten(1)).mean(1)
        return dataclasses.replace(inputs, pair_log_ratio=ratio)
    if not algorithm.loss.needs_teachers:
        return inputs
    teacher = algorithm.sampler.step(samples.x, teacher_velocity(samples), interval)
    return dataclasses.replace(inputs, teacher_kl=algorithm.likelihood.kl(step, teacher.mean))


def teacher_velocity(samples):
    """A velocity of another policy at the samples' states."""
    return samples.old_velocity - 0.5 * samples.x0


def output_of(algorithm, samples):
    """The loss's output, and its gradient with respect to the samples' velocity."""
    output = algorithm.loss(inputs_of(algorithm, samples))
    (gradient,) = torch.autograd.grad(output.loss, samples.velocity)
    return output, gradient


def numbers(output):
    return {name: value.item() for name, value in output.metrics.items()}


FAR, NEAR = 0.3, 1e-5
"""Distances at which clips and masks hold some samples back, and at which most hold none."""
distances = pytest.mark.parametrize("distance", [0.0, NEAR, FAR])
