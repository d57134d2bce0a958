"""DRaFT and ReFL: the reward is climbed by its own gradient, through the sampler's last steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from flowrl.errors import UserError
from flowrl.losses.protocol import DirectLoss
from flowrl.types import DirectInputs, LogProbForm, LossOutput, Reduction
from flowrl.values.bounds import Ceiling


@dataclass(kw_only=True)
class DRaFT(DirectLoss):
    """Mean over samples of -min(r, reward_cap), where r is the reward with its gradient.

    DRaFT-K (Clark et al. 2023, arXiv 2309.17400) is `path` steps with `last_steps` K: the gradient
    of r goes through the scorer, the autoencoder and the last K steps, and the state before these
    is a constant. With K the number of all steps it is DRaFT (AlignProp, arXiv 2310.03739).
    DRaFT-LV is K = 1 with `num_noises` 2: the sample x0 is noised to the last step's sigma,
    x = (1 - sigma) x0 + sigma eps, comes back by x - sigma v, and the gradients of the rewards of
    all 1 + `num_noises` are averaged.

    ReFL (Xu et al. 2023, arXiv 2304.05977) is `path` jump: one of the last `last_steps` steps,
    drawn anew each iteration for all samples, has the gradient, and the scorer sees the estimate
    x - sigma v there. Its relu(2 - r) is `reward_cap` 2 up to a constant: beyond the cap a sample
    gives no gradient.

    ReFL's published script evaluates its network at the step's number in place of its time and
    scales the loss by 1e-3, and the paper adds a pretraining loss; none of that is here.
    """

    name: ClassVar[str] = "draft"

    reward_cap: Ceiling

    def check(self, *, form: LogProbForm, reduction: Reduction, sampler: str) -> None:
        if self.num_noises and (self.path != "steps" or self.last_steps > 1):
            raise UserError(
                f"loss.num_noises={self.num_noises} noises samples to the last step alone: set "
                "loss.path=steps and loss.last_steps=1, or loss.num_noises=0"
            )

    def __call__(self, inputs: DirectInputs) -> LossOutput:
        reward = torch.where(inputs.is_used, inputs.reward, 0.0)
        # Left alone where it is used: a sample that is not counts as 0, whatever the cap is.
        capped = torch.where(inputs.is_used, reward.clamp(max=self.reward_cap), 0.0)
        return LossOutput(-capped.mean(), {})
