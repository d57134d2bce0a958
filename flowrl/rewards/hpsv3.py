"""HPSv3: a human-preference score from a reward head on Qwen2-VL (Ma et al. 2025, arXiv
2508.03789).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from flowrl.errors import UserError
from flowrl.rewards.client import Unanswered
from flowrl.rewards.judge import Judge, Question
from flowrl.rewards.outputs import REASON
from flowrl.rewards.protocol import Images
from flowrl.types import Prompt, RewardOutput
from flowrl.values.bounds import Positive


class HPSv3:
    """The first output of the head, the mean of the score's Gaussian, over `scale` (15 in UniRL).

    The server runs the checkpoint as a pooling model (`vllm serve MODEL --runner pooling`), whose
    chat template puts HPSv3's instruction and reward token around the image and the caption, which
    are all that is sent here.
    """

    def __init__(self, *, scale: Positive, judge: Judge) -> None:
        if scale <= 0:
            raise UserError(f"reward.scale={scale} must be above 0")
        self.scale = scale
        self.judge = judge

    part_names = ()

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        heads = self.judge.pool(
            images, [Question(i, prompt.text) for i, prompt in enumerate(prompts)]
        )
        info: list[Mapping[str, object]] = [
            {REASON: str(h)} if isinstance(h, Unanswered) else {} for h in heads
        ]
        scores = (
            torch.tensor([math.nan if isinstance(head, Unanswered) else head[0] for head in heads])
            / self.scale
        )
        return RewardOutput(scores.nan_to_num(0.0, 0.0, 0.0), scores.isfinite(), {}, info)
