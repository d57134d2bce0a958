"""On-policy distillation: the exact KL between a step of the policy and a frozen teacher's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flowrl.losses.protocol import ReverseLoss
from flowrl.types import LossInputs, LossOutput


@dataclass(frozen=True, kw_only=True)
class OPD(ReverseLoss):
    """Mean over samples of KL(N(mean, std^2) || N(teacher_mean, std^2)) = |mean - teacher_mean|^2 /
    (2 std^2), reduced over latent dimensions as the likelihood is.

    Both steps are Gaussians of one std at a state that the policy itself came to, so that the KL is
    exact and the same in both directions. Each sample has the teacher of its prompt's family.
    Advantages are not looked at: rewards are scored for the log alone. Papers: DiffusionOPD (arXiv
    2605.15055), Flow-OPD (arXiv 2605.08063). The published recipes of the former distil along
    deterministic rollouts, by |mean - teacher_mean|^2 / 2 without the variance; here a step needs
    noise. Raises ValueError, when it is called, for inputs without a teacher.
    """

    name: ClassVar[str] = "opd"
    needs_rewards: ClassVar[bool] = False
    needs_advantages: ClassVar[bool] = False
    needs_teachers: ClassVar[bool] = True

    def __call__(self, inputs: LossInputs) -> LossOutput:
        if inputs.teacher_kl is None:
            raise ValueError("loss=opd needs LossInputs.teacher_kl, the KL to a teacher's step")
        return LossOutput(inputs.teacher_kl.mean(), {})
