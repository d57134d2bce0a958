"""UnifiedReward: a judge that writes a score from 1 to 5 (Wang et al. 2025, arXiv 2503.05236)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

from flowrl.rewards.client import Unanswered
from flowrl.rewards.judge import Judge, Question
from flowrl.rewards.outputs import REASON
from flowrl.rewards.protocol import Images
from flowrl.types import Prompt, RewardOutput

QUESTION = (
    "You are given a text caption and a generated image based on that caption. Your task is to "
    "evaluate this image "
    "based on two key criteria:\n1. Alignment with the Caption: Assess how well this image aligns "
    "with the provided "
    "caption. Consider the accuracy of depicted objects, their relationships, and attributes as "
    "described in the "
    "caption.\n2. Overall Image Quality: Examine the visual quality of this image, including "
    "clarity, detail "
    "preservation, color accuracy, and overall aesthetic appeal.\nBased on the above criteria, "
    "assign a score from 1 "
    "to 5 after 'Final Score:'.\nYour task is provided as follows:\nText Caption: [{caption}]"
)
"""The words that the model was trained on; others move its scores."""
SCORE = re.compile(r"Final Score:\s*\**\s*(\d+(?:\.\d+)?)")


class UnifiedReward:
    """The number after "Final Score:", over 5, as flow_grpo has it. Without one from 1 to 5,
    missing (there: 0).
    """

    def __init__(self, *, judge: Judge) -> None:
        self.judge = judge

    part_names = ()

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        # Not str.format: a caption may hold braces.
        questions = [
            Question(i, QUESTION.replace("{caption}", prompt.text))
            for i, prompt in enumerate(prompts)
        ]
        values: list[float] = []
        info: list[Mapping[str, object]] = []
        for reply in self.judge.ask(images, questions):
            found = None if isinstance(reply, Unanswered) else SCORE.search(reply.text)
            found = found if found and 1 <= float(found[1]) <= 5 else None
            values.append(float(found[1]) / 5 if found else torch.nan)
            if found:
                info.append({})
            else:
                said = (
                    str(reply)
                    if isinstance(reply, Unanswered)
                    else f"no 'Final Score:' from 1 to 5 in {reply.text[-200:]!r}"
                )
                info.append({REASON: said})
        scores = torch.tensor(values)
        return RewardOutput(scores.nan_to_num(0.0), scores.isfinite(), {}, info)
