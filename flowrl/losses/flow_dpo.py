"""Flow-DPO: direct preference optimisation on pairs of samples of one prompt, noised alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from flowrl.errors import UserError
from flowrl.losses.preference import PreferenceLoss, error_change, pairs
from flowrl.losses.used import keep_used
from flowrl.types import ForwardInputs, LossOutput
from flowrl.values.bounds import Samples

POWERS = {"constant": 0, "one_minus_sigma_squared": 2}
"""The power of 1 - sigma that a weighting multiplies beta by, by its name."""


@dataclass(kw_only=True)
class FlowDPO(PreferenceLoss):
    """Mean over pairs of -log sigmoid(m), m = -beta / 2 (change_w - change_l), for a sample w that
    is preferred to l.

    change = mean ((u - v)^2 - (u - anchor_v)^2) over latent dimensions, u = eps - x0, where both
    samples of a pair are noised to one sigma with one noise. In each group the `num_pairs` best
    samples are paired with as many worst ones; equal advantages are no pair, nor is one with a
    sample that is not used. Samples outside pairs are not evaluated. The mean is over samples, each
    with the term of its pair, so that one without a pair counts as 0.

    `weighting` multiplies beta by 1 or (1 - sigma)^2. Papers: Flow-DPO (Liu et al. 2025, arXiv
    2501.13918), which derives the second and finds the first better; Diffusion-DPO (Wallace et al.
    2023, arXiv 2311.12908). As in flow_grpo's code, errors are means over latent dimensions, so
    that beta is D times that of sums, and it is halved.
    """

    name: ClassVar[str] = "flow_dpo"

    num_pairs: Samples
    weighting: Literal["constant", "one_minus_sigma_squared"]

    def __call__(self, inputs: ForwardInputs) -> LossOutput:
        used = keep_used(inputs)
        assert used.group is not None
        is_pair = pairs(
            used.advantage, group=used.group, is_used=used.is_used, num_pairs=self.num_pairs
        )
        change = error_change(used, anchor=self.anchor_velocity(used))
        # Each preferred sample has one partner, so that the sum over a row is that one's change.
        change_of_other = torch.where(is_pair, change, 0.0).sum(1)
        weight = (1 - used.sigma) ** POWERS[self.weighting]
        margin = self.beta / 2 * weight * (change_of_other - change)
        is_preferred = is_pair.any(1)
        losses = torch.where(is_preferred, -logsigmoid(margin), 0.0)
        share = 2 / len(losses)  # a pair is two samples
        with torch.no_grad():
            metrics = {
                "preference/margin": torch.where(is_preferred, margin, 0.0).sum() * share,
                "preference/accuracy": (is_preferred & (margin > 0)).sum().to(margin) * share,
            }
        return LossOutput(losses.sum() * share, metrics)

    def num_selected(self, group_size: int) -> int:
        if 2 * self.num_pairs > group_size:
            raise UserError(
                f"loss.num_pairs={self.num_pairs} needs {2 * self.num_pairs} samples of a prompt, "
                f"but batch.group_size={group_size}; lower loss.num_pairs or raise batch.group_size"
            )
        return 2 * self.num_pairs

    def selected(
        self,
        advantage: Float[Tensor, "B"],
        *,
        group: Int[Tensor, "B"],
        is_used: Bool[Tensor, "B"],
    ) -> Bool[Tensor, "B"]:
        is_pair = pairs(advantage, group=group, is_used=is_used, num_pairs=self.num_pairs)
        return is_pair.any(0) | is_pair.any(1)
