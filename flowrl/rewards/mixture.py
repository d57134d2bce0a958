"""A weighted mixture of rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from flowrl.advantages import weighted_sum
from flowrl.errors import UserError
from flowrl.rewards.attempt import attempt
from flowrl.rewards.outputs import REASON
from flowrl.rewards.protocol import Images, Reward
from flowrl.types import Prompt, RewardOutput
from flowrl.values.bounds import Finite


class Mixture(nn.Module):
    """The weighted sum of named rewards, with each of them as a term for advantages that treat them
    apart.

    Parts: the value of each reward under its name, and its own parts under `<name>_<part>`. A
    sample that one of them could not score is missing. A reward that does not apply to a prompt is
    no part of that prompt's sum. A reward of weight 0 only monitors: it is no term, its failures
    are logged, and where it scored nothing its parts are left out.
    """

    def __init__(self, *, rewards: Mapping[str, Reward], weights: Mapping[str, Finite]) -> None:
        super().__init__()
        if not rewards or rewards.keys() != weights.keys():
            raise UserError(
                f"reward.weights ({', '.join(weights)}) must name the rewards of reward.rewards "
                f"({', '.join(rewards)})"
            )
        self.terms = {name: reward for name, reward in rewards.items() if weights[name] != 0}
        self.monitors = {name: reward for name, reward in rewards.items() if weights[name] == 0}
        if not self.terms:
            raise UserError("reward.weights: at least one must differ from 0")
        self.weights = tuple(float(weights[name]) for name in self.terms)
        # Registered, so that scorers with weights are moved and frozen with the mixture.
        self.networks = nn.ModuleList(
            reward for reward in rewards.values() if isinstance(reward, nn.Module)
        )

    def forward(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        outputs = {
            name: attempt(reward, images, prompts, f"reward {name}")
            for name, reward in self.terms.items()
        }
        applies = torch.stack([_applies(output) for output in outputs.values()], 1)
        terms = torch.stack([output.values.float().cpu() for output in outputs.values()], 1)
        # NaN stands for a reward that does not apply, so a term that is no number must be marked
        # here.
        is_valid = (
            torch.stack([output.is_valid.cpu() for output in outputs.values()], 1)
            & terms.isfinite()
        )
        for name, reward in self.monitors.items():
            output = attempt(reward, images, prompts, f"monitoring reward {name}")
            if output.is_valid.any():
                outputs[name] = output
        parts = {}
        for name, output in outputs.items():
            has_value = output.is_valid.cpu() & _applies(output)
            parts[name] = torch.where(has_value, output.values.float().cpu(), torch.nan)
            for part, values in output.parts.items():
                parts[f"{name}_{part}"] = torch.where(has_value, values.float().cpu(), torch.nan)
        values = weighted_sum(
            terms.masked_fill(~applies, torch.nan), terms.new_tensor(self.weights)
        )
        info = _reasons({name: outputs[name] for name in self.terms}, len(prompts))
        return RewardOutput(
            values, (is_valid | ~applies).all(1), parts, info, terms, self.weights, applies
        )


def _reasons(outputs: Mapping[str, RewardOutput], count: int) -> list[dict[str, str]]:
    """For each sample why the first of its rewards that failed did so, where that one says it."""
    info: list[dict[str, str]] = [{} for _ in range(count)]
    for name, output in outputs.items():
        for entry, own in zip(info, output.info, strict=False):  # the info of a reward may be empty
            if REASON in own:
                entry.setdefault(REASON, f"{name}: {own[REASON]}")
    return info


def _applies(output: RewardOutput) -> torch.Tensor:
    """Whether a reward, which may be a mixture itself, applies to each sample."""
    return (
        torch.ones(len(output.values), dtype=torch.bool)
        if output.applies is None
        else output.applies.cpu().any(1)
    )
