"""One method as data: the choices that make up Flow-GRPO, Flow-CPS or Flow-DPPO, and the rules
between them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flowrl.advantages import Advantages
from flowrl.diagnostics import Diagnostics
from flowrl.errors import UserError
from flowrl.gaussian import GaussianStep, Likelihood, tv
from flowrl.losses.dppo import DPPO
from flowrl.losses.guard import guard
from flowrl.losses.nft import NFT
from flowrl.losses.reference import ReferencePenalty
from flowrl.samplers.cps import CPS
from flowrl.samplers.protocol import Sampler, Solver
from flowrl.samplers.sde import FlowSDE
from flowrl.samplers.steps import StochasticSteps
from flowrl.schedule import Interval, Schedule, intervals
from flowrl.types import LossInputs, LossOutput, Trajectory
from flowrl.values.bounds import Guidance, Steps


def option(part: object) -> str:
    """The word on the command line for a sampler: its class's name in snake case, `flow_sde` for
    FlowSDE.
    """
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(part).__name__).lower()


PolicyLoss = Callable[[LossInputs], LossOutput]
Advantage = Callable[
    [Float[Tensor, "B R"], Float[Tensor, "R"], Int[Tensor, "B"], Bool[Tensor, "B"]], Advantages
]

MIN_STD = 0.01
"""Steps with a smaller std are refused: their log-probabilities overwhelm all others (the last
step, and the second-to-last on diffusers' default grid).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """Sampler, grid, trained steps, likelihood, loss, penalty, advantage and diagnostics of a
    run.
    """

    sampler: Sampler
    schedule: Schedule
    num_steps: Steps
    steps: StochasticSteps
    guidance_scale: Guidance
    shared_initial_noise: bool
    likelihood: Likelihood
    loss: PolicyLoss | NFT
    penalty: ReferencePenalty
    advantage: Advantage
    diagnostics: Diagnostics

    def __post_init__(self) -> None:
        if isinstance(self.loss, NFT):
            self._check_forward_loss()
        else:
            self._check_ratio_loss(self.loss)

    def _check_forward_loss(self) -> None:
        if not isinstance(self.sampler, Solver):
            raise UserError(
                f"loss=nft needs a deterministic rollout, but sampler={option(self.sampler)}: "
                "choose "
                "sampler=ode or sampler=dpm2"
            )
        if self.penalty.beta and self.penalty.form != "velocity":
            raise UserError(
                f"loss=nft has no steps to compare means of, but penalty.form={self.penalty.form}: "
                "choose "
                "penalty=velocity or penalty=none"
            )
        if self.shared_initial_noise:
            raise UserError(
                "loss=nft draws equal samples in each group with "
                "rollout.shared_initial_noise=true: set it to false"
            )

    def _check_ratio_loss(self, loss: PolicyLoss) -> None:
        zero = torch.zeros(1)
        how = self.likelihood
        # The loss checks its options now, not late.
        loss(
            LossInputs(
                zero, zero, zero, zero, zero, zero, 1.0, -1.0, how.form, how.reduction, dimensions=1
            )
        )
        if how.form == "unnormalised" and not isinstance(self.sampler, CPS):
            raise UserError(
                "likelihood.form=unnormalised (loss=cps) needs sampler=cps, not "
                f"{option(self.sampler)}: it "
                "leaves out 1 / (2 std^2), to which published ranges are blind"
            )
        if getattr(loss, "func", loss) is guard and not isinstance(self.sampler, FlowSDE):
            raise UserError(
                f"loss=guard needs sampler=flow_sde, not {option(self.sampler)}: its centred ratio "
                "and its "
                "division by -dt belong to that step"
            )
        candidates = self.steps.candidates(self.num_steps)
        if not candidates:
            raise UserError(
                f"steps: no stochastic step among rollout.num_steps={self.num_steps}; a ratio loss "
                "needs one"
            )
        for k in candidates:
            self._check_step(k)

    def _check_step(self, k: int) -> None:
        if k >= self.num_steps:
            raise UserError(
                f"steps may pick step {k}, but the last of rollout.num_steps={self.num_steps} is "
                f"step {self.num_steps - 1}; lower steps.high"
            )
        std = self.sampler.std(self.intervals[k])
        if std == 0 and k < self.num_steps - 1:
            raise UserError(
                f"sampler={option(self.sampler)} is deterministic (std 0 at step {k}), but the "
                "loss needs a "
                "stochastic step: choose sampler=cps or sampler=flow_sde with sampler.noise_level "
                "above 0, or loss=nft"
            )
        if std < MIN_STD:
            raise UserError(
                f"steps may pick step {k} of rollout.num_steps={self.num_steps}, where "
                f"sampler={option(self.sampler)} has std {std:.2g} < {MIN_STD}: "
                "a zero-variance step is never trained on; lower steps.high or use "
                "steps=all_but_last"
            )

    def stochastic(self, iteration: int, seed: int) -> tuple[int, ...]:
        """The stochastic steps of an iteration's rollouts; none for a forward-process loss."""
        return (
            () if isinstance(self.loss, NFT) else self.steps.draw(self.num_steps, iteration, seed)
        )

    def begin(self, progress: float) -> None:
        """Before an iteration's updates: a threshold may follow a schedule."""
        if isinstance(self.loss, DPPO):
            self.loss.begin(progress)

    def observe(self, metrics: Mapping[str, float], num_updates: int) -> None:
        """After an iteration's updates: a threshold may hold a budget.

        The first update starts at the rollout's weights, where the KL is 0, so the mean is taken
        over the others.
        """
        if isinstance(self.loss, DPPO) and num_updates > 1:
            self.loss.observe(metrics["trust/kl_old"] * num_updates / (num_updates - 1))

    def diagnose(self, inputs: LossInputs, step: int) -> dict[str, Tensor]:
        """The diagnostics of a step, at the threshold in force where the loss has one on the KL."""
        if isinstance(self.loss, DPPO) and self.loss.divergence == "kl":
            return replace(self.diagnostics, delta=self.loss.current)(inputs, step)
        return self.diagnostics(inputs, step)

    def state(self) -> dict[str, float]:
        """Return what a checkpoint must keep of the loss: a threshold that holds a budget."""
        return (
            {"delta": self.loss.current}
            if isinstance(self.loss, DPPO) and self.loss.delta == "auto"
            else {}
        )

    def load_state(self, state: Mapping[str, float]) -> None:
        """Take back what `state` gave; unless both runs hold a budget, the new run's threshold
        stands.
        """
        if isinstance(self.loss, DPPO) and self.loss.delta == "auto" and "delta" in state:
            self.loss.current = state["delta"]

    def compare(
        self, step: GaussianStep, trajectory: Trajectory, index: int, advantage: Float[Tensor, "B"]
    ) -> LossInputs:
        """The current policy's `step` against the rollout's, at the trajectory's `index`-th
        stochastic step.
        """
        interval = self.intervals[trajectory.steps[index]]
        old_mean = trajectory.old_mean[:, index]
        kl = self.likelihood.kl(step, old_mean)  # with its gradient, which GRPO-Guard's ratio needs
        with torch.no_grad():
            distance = tv(step, old_mean)
            # Both means belong to one state, so they differ by their velocities alone.
            moved = ((step.mean - old_mean) / self.sampler.gain(interval)).square().mean((1, 2, 3))
        return LossInputs(
            log_prob=self.likelihood.log_prob(step, trajectory.x_next[:, index]),
            old_log_prob=trajectory.old_log_prob[:, index],
            advantage=advantage,
            kl=kl,
            tv=distance,
            velocity=moved,
            std=step.std,
            dt=interval.dt,
            form=self.likelihood.form,
            reduction=self.likelihood.reduction,
            dimensions=old_mean[0].numel(),
        )

    @property
    def intervals(self) -> tuple[Interval, ...]:
        """The steps of the rollout's sigma grid."""
        return intervals(self.schedule, self.num_steps)
