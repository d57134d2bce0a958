"""HPSv3 is a human-preference score from a reward head on Qwen2-VL (Ma et al. 2025, arXiv
2508.03789).
"""

from __future__ import annotations

from collections.abc import Sequence

from flowrl.rewards.client import Unanswered
from flowrl.rewards.judge import Judge, Question
from flowrl.rewards.outputs import finite_valid, scores_or_reasons
from flowrl.rewards.protocol import Images
from flowrl.types import Prompt, RewardOutput
from flowrl.values.bounds import Positive
from flowrl.values.check import checked


class HPSv3:
    """The first output of the head, the mean of the score's Gaussian, over `scale` (15 in UniRL).

    The server runs the checkpoint as a pooling model (`vllm serve MODEL --runner pooling`), whose
    chat template puts HPSv3's instruction and reward token around the image and the caption, which
    are all that is sent here.
    """

    @checked("reward")
    def __init__(self, *, scale: Positive, judge: Judge) -> None:
        self.scale = scale
        self.judge = judge

    part_names = ()

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        questions = [Question(image, prompt.text) for image, prompt in enumerate(prompts)]
        heads = self.judge.pool(images, questions)
        # A question that got no reply leaves its sample without a score, and the reason instead.
        scores_with_reasons = [_score(head) for head in heads]
        scores, info = scores_or_reasons(scores_with_reasons)
        return finite_valid(scores / self.scale, {}, info)


def _score(head: list[float] | Unanswered) -> float | str:
    """Return the mean, the first of the head's two outputs, or say why there is none."""
    return str(head) if isinstance(head, Unanswered) else head[0]
