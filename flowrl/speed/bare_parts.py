"""The bare parts of an iteration: its forwards and backwards, decodes and reward calls, batched as
the run batches them, in plain loops with nothing around them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from flowrl.errors import UserError
from flowrl.parallel.strategies import synchronised
from flowrl.rewards.attempt import attempt
from flowrl.rewards.clips import Clips
from flowrl.rewards.protocol import asks_for_whole_groups
from flowrl.training.optimization import velocity_in_updates
from flowrl.training.policy import Policy
from flowrl.training.prompt_data import PromptBatch
from flowrl.training.sampling import draw

Seconds = dict[str, float]
"""What each part of an iteration took, by its name."""


def _require_measured(policy: Policy) -> None:
    """Raise UserError for a loss whose updates are made of other parts."""
    loss = policy.algorithm.loss
    if loss.kind == "direct":
        raise UserError(
            f"loss={loss.name}: an update that passes through decoding and the scorer is not "
            "measured; benchmark another loss"
        )


class BareParts:
    """The parts of a process's share of one iteration of a policy, each as a plain loop over its
    micro-batches; the first of these alone where it `is_short`.

    Rows of a group are evaluated once while they are equal, exactly as the run does for the same
    iteration's steps, which are those of the share's first prompt for all. All processes must make
    the same parts: passes of weights that are divided gather them. Raises UserError for a loss of
    kind direct, whose updates are made of other parts.
    """

    def __init__(self, policy: Policy, batch: PromptBatch, *, is_short: bool = False) -> None:
        _require_measured(policy)
        self.policy = policy
        plan = policy.plan
        micro_batches = [rows for update in plan.updates(policy.global_rank) for rows in update]
        rows = micro_batches[0]
        stochastic = policy.objective.stochastic_steps(batch.iteration, plan.member(rows[0])[0])
        self.num_micro_batches = 1 if is_short else len(micro_batches)
        self.group, trajectory = draw(policy, batch, rows, stochastic)
        self.is_checkpointed = bool(policy.transformer.is_gradient_checkpointing)
        self.field = self.group.field(policy.velocity)
        self.update_field = self.group.field(partial(velocity_in_updates, policy))
        self.ref_field = self.group.field(policy.reference.velocity)
        self.x = torch.randn(len(rows), *policy.model.latent_shape, device=policy.device)
        self._set_steps(stochastic)
        self.batch = batch
        pieces = policy.scouting.pieces(policy, batch.iteration, policy.global_rank)
        self.candidates = pieces[:1] if is_short else pieces
        # Real images: the verifier is slower on noise.
        images = policy.model.decode(trajectory.x0)
        size = plan.group_size if asks_for_whole_groups(policy.reward.reward) else len(rows)
        self.images = torch.cat([images] * -(-size // len(rows)))[:size]
        prompts = [batch.prompts[plan.member(row)[0]] for part in micro_batches for row in part]
        calls = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        self.calls = calls[:1] if is_short else calls

    def _set_steps(self, stochastic: tuple[int, ...]) -> None:
        """List the sigmas of rollouts and of updates, each with whether equal rows are evaluated
        once.
        """
        policy = self.policy
        method = policy.algorithm
        shares = method.shared_initial_noise
        sigmas = [interval.sigma for interval in method.intervals]
        first_noise = min(stochastic, default=len(sigmas))
        self.rollout_steps = [
            (sigma, shares and k <= first_noise) for k, sigma in enumerate(sigmas)
        ]
        # A loss on samples that are noised again asks the old policy too. Each sample trains on as
        # many sigmas as any other, on whichever of the grid.
        self.has_old_policy = method.loss.needs_old
        trained: Sequence[int] = range(policy.objective.num_trained())
        if method.loss.kind == "reverse":
            trained = method.trained.candidates(stochastic)
        self.trained_steps = [(sigmas[k], shares and k == first_noise) for k in trained]

    def scouting(self) -> None:
        """Draw and score the candidates as the run does, noise included; a scorer that asks for
        whole groups, which micro-batches need not be, scores none of them.
        """
        policy = self.policy
        for piece in self.candidates:
            images = policy.scouting.draw(policy, self.batch, piece)
            if not asks_for_whole_groups(policy.reward.reward):
                members = policy.scouting.members(piece[0])
                policy.reward.score(images, [self.batch.prompts[prompt] for prompt, _ in members])

    @torch.no_grad()
    def rollout(self) -> None:
        """Evaluate the velocity at each step of the grid."""
        for _ in range(self.num_micro_batches):
            for sigma, is_shared in self.rollout_steps:
                self.field(self.x, sigma, is_shared)

    def decode(self) -> None:
        """Decode as many latents as a rollout ends with."""
        for _ in range(self.num_micro_batches):
            self.policy.model.decode(self.x)

    @torch.no_grad()
    def reward(self) -> None:
        """Score as many images as there are, or of clips the frames that are shown."""
        module = self.policy.reward
        for prompts in self.calls:
            if module.frames is not None and self.images.ndim == 5:
                attempt(module.reward, Clips(self.images, module.frames), prompts)
            else:
                module.reward(self.images, prompts)

    def update(self) -> None:
        """Evaluate trained steps forwards and backwards, and before that the old policy, where
        there is one.
        """
        # As before an update's last term: gradients of processes do not meet.
        with synchronised(self.policy, is_last=False):
            for _ in range(self.num_micro_batches * self.policy.plan.inner_epochs):
                for sigma, is_shared in self.trained_steps:
                    if self.has_old_policy:
                        with torch.no_grad():
                            self.update_field(self.x, sigma, is_shared)
                    velocity = self.update_field(self.x, sigma, is_shared)
                    velocity.backward(torch.ones_like(velocity))
        for parameter in self.policy.parameters():
            parameter.grad = None

    @torch.no_grad()
    def reference(self) -> None:
        """Evaluate the reference at trained steps, where penalty or loss need it."""
        if self.policy.algorithm.needs_reference:
            for _ in range(self.num_micro_batches * self.policy.plan.inner_epochs):
                for sigma, is_shared in self.trained_steps:
                    self.ref_field(self.x, sigma, is_shared)

    def parts(self) -> dict[str, Callable[[], None]]:
        """Return the loops by name."""
        scouting = {"scouting": self.scouting} if self.candidates else {}
        return scouting | {
            "rollout": self.rollout,
            "decode": self.decode,
            "reward": self.reward,
            "update": self.update,
            "reference": self.reference,
        }


def slowest(processes: Sequence[Sequence[Seconds]]) -> list[Seconds]:
    """Return, of each iteration, the parts of the process whose parts take longest together.

    `processes` has what each process measured, an entry an iteration.
    """
    iterations = zip(*processes, strict=True)
    return [max(parts, key=lambda seconds: sum(seconds.values())) for parts in iterations]
