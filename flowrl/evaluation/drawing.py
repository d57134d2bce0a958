"""Pictures of prompts that belong to no set: from noise of their own, by the evaluator's path."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from flowrl.evaluation.evaluator import Evaluator
from flowrl.models.embeddings import PromptEmbeddings
from flowrl.models.protocol import FlowModel
from flowrl.models.text import device
from flowrl.noise import INITIAL, gaussian_noise
from flowrl.types import Prompt

ITERATION = 2**32 - 2
"""The noise iteration of pictures, which neither training nor evaluation reaches."""


def draw_prompt(
    model: FlowModel,
    embed: PromptEmbeddings,
    evaluator: Evaluator,
    prompt: Prompt,
    *,
    number: int,
    count: int,
    seed: int,
) -> Float[Tensor, "count *F 3 H W"]:
    """Draw `count` images or clips of a prompt, which is the `number`-th of those that are drawn,
    under the model's weights as they are; their noise depends on seed, number and place alone.
    """
    samples = [(number, i) for i in range(count)]
    noise = gaussian_noise(
        model.latent_shape, seed=seed, iteration=ITERATION, samples=samples, step=INITIAL
    )
    return evaluator.draw(model, embed([prompt] * count), noise.to(device()))
