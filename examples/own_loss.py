"""A loss of one's own: PPO's other form, which pays for divergence where the mask and the clip cut.

Source: Schulman et al. 2017 (arXiv 1707.06347), section 4; here the KL is exact, since each step of
a flow sampler is a Gaussian of fixed variance.
"""

# %%
from dataclasses import dataclass
from typing import ClassVar

from flowrl.api import load
from flowrl.losses.protocol import ReverseLoss
from flowrl.types import LossOutput


# %% A loss is a dataclass: its fields are options, its call is a function of one step's samples.
@dataclass(frozen=True, kw_only=True)
class KLPenalty(ReverseLoss):
    """The loss mean(-A r + beta KL), with the ratio r = exp(log_ratio)."""

    name: ClassVar[str] = "kl_penalty"
    # A metric beyond the glossary is declared, and then logged with the others.
    metrics: ClassVar[dict[str, str]] = {"example/price": "Mean of beta KL, what divergence costs."}

    beta: float

    def __call__(self, inputs):
        ratio = inputs.log_ratio.exp()
        price = self.beta * inputs.kl
        loss = -inputs.advantage * ratio + price
        return LossOutput(loss.mean(), {"example/price": price.mean()})


# %% A small and a large price, from the same weights and noise.
NUM_ITERATIONS = 5
overrides = ("num_iterations=20", "batch.prompts_per_iteration=8")
for beta in (1.0, 1e4):
    experiment = load(*overrides, loss=KLPenalty(beta=beta))
    last = experiment.train(NUM_ITERATIONS)[-1]
    print(f"beta {beta:g}: reward {last['reward/mean']:.3f}, KL {last['trust/kl_old']:.1e}")
