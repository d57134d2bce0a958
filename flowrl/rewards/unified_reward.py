"""UnifiedReward is a judge that writes a score from 1 to 5 (Wang et al. 2025, arXiv 2503.05236)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from flowrl.rewards.client import Unanswered
from flowrl.rewards.judge import Judge, Question, Reply
from flowrl.rewards.outputs import finite_valid, scores_or_reasons
from flowrl.rewards.protocol import Images
from flowrl.types import Prompt, RewardOutput

QUESTION = (
    "You are given a text caption and a generated image based on that caption. Your task is to "
    "evaluate this image based on two key criteria:\n"
    "1. Alignment with the Caption: Assess how well this image aligns with the provided caption. "
    "Consider the accuracy of depicted objects, their relationships, and attributes as described "
    "in the caption.\n"
    "2. Overall Image Quality: Examine the visual quality of this image, including clarity, "
    "detail preservation, color accuracy, and overall aesthetic appeal.\n"
    "Based on the above criteria, assign a score from 1 to 5 after 'Final Score:'.\n"
    "Your task is provided as follows:\n"
    "Text Caption: [{caption}]"
)
"""The words that the model was trained on; others move its scores."""
SCORE = re.compile(r"Final Score:\s*\**\s*(\d+(?:\.\d+)?)")


class UnifiedReward:
    """The number after "Final Score:", over 5, as flow_grpo has it; a reply without one from 1 to 5
    makes its sample missing (there: 0).
    """

    def __init__(self, *, judge: Judge) -> None:
        self.judge = judge

    part_names = ()

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        # Not str.format: a caption may hold braces.
        texts = [QUESTION.replace("{caption}", prompt.text) for prompt in prompts]
        questions = [Question(image, text) for image, text in enumerate(texts)]
        replies = self.judge.ask(images, questions)
        scores_with_reasons = [_score(reply) for reply in replies]
        scores, info = scores_or_reasons(scores_with_reasons)
        return finite_valid(scores, {}, info)


def _score(reply: Reply | Unanswered) -> float | str:
    """Read the score of a reply, or say why it has none."""
    if isinstance(reply, Unanswered):
        return str(reply)
    match = SCORE.search(reply.text)
    is_whole = match is not None and not reply.may_lack_digits(match.end())
    if match is None or not is_whole or not 1 <= float(match[1]) <= 5:
        return f"no 'Final Score:' from 1 to 5 in {reply.text[-200:]!r}"
    return float(match[1]) / 5
