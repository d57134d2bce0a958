"""GenEval2's Soft-TIFA: how sure a judge is of the right answer to each question about a prompt's
atoms.

Kamath et al. 2025, arXiv 2512.16853. A prompt's metadata hold `vqa_list`, pairs of a question and
its answer, and may hold `skills`, one for each question.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from flowrl.errors import UserError
from flowrl.rewards.client import Unanswered
from flowrl.rewards.judge import Judge, Question, Reply
from flowrl.rewards.outputs import REASON
from flowrl.rewards.protocol import Images
from flowrl.types import Prompt, RewardOutput

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def variants(question: str, answer: str) -> set[str]:
    """First tokens that count as `answer`: capitalised or not, after a space or not, numbers up to
    ten as digits.
    """
    words = {answer, answer.capitalize()}
    if question.startswith("How many") and answer.lower() in NUMBERS:
        words.add(str(NUMBERS.index(answer.lower())))
    elif not question.startswith("How many"):
        words.add(answer.lower())
    return words | {f" {word}" for word in words}


class GenEval2:
    """`mean`: `geometric` over a prompt's questions (the benchmark's prompt-level score) or
    `arithmetic` (atom-level).

    A question's score is the probability of the right answer's first token, summed over its
    `variants`, asked as "QUESTION Answer in one word.". Published code sums over the whole
    vocabulary and counts a token twice that two variants begin with; here a token outside the
    judge's `top_logprobs` counts 0, and each counts once.

    Parts: geometric, arithmetic, and skill_NAME, the arithmetic mean over the questions of one
    skill. A sample without questions, or with a question that got no reply, is missing.
    """

    def __init__(self, *, mean: Literal["geometric", "arithmetic"], judge: Judge) -> None:
        if mean not in ("geometric", "arithmetic"):
            raise UserError(f"reward.mean={mean!r} must be geometric or arithmetic")
        if judge.top_logprobs < 1:
            raise UserError(
                f"judge.top_logprobs={judge.top_logprobs} must be at least 1 for geneval2"
            )
        self.mean = mean
        self.judge = judge

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        asked = [_pairs(prompt) for prompt in prompts]
        questions = [
            Question(i, f"{pair[0]} Answer in one word.")
            for i, pairs in enumerate(asked)
            for pair in pairs
        ]
        replies = iter(self.judge.ask(images, questions))
        info: list[Mapping[str, object]] = []
        scores: list[dict[str, float]] = []
        for prompt, pairs in zip(prompts, asked, strict=True):
            own = [next(replies) for _ in pairs]
            failed = next((str(reply) for reply in own if isinstance(reply, Unanswered)), None)
            reason = (
                failed
                if pairs
                else f"prompt {prompt.text!r} has no vqa_list, pairs of texts, in its metadata"
            )
            chances = [
                chance(reply, *pair)
                for reply, pair in zip(own, pairs, strict=True)
                if isinstance(reply, Reply)
            ]
            info.append({REASON: reason} if reason else {"answers": chances})
            scores.append({} if reason else _means(chances, prompt.metadata.get("skills") or ()))
        names = dict.fromkeys(
            ["geometric", "arithmetic", *(name for score in scores for name in score)]
        )
        parts = {
            name: torch.tensor([score.get(name, math.nan) for score in scores]) for name in names
        }
        values = parts[self.mean]
        return RewardOutput(values.nan_to_num(0.0), values.isfinite(), parts, info)


def _pairs(prompt: Prompt) -> list[tuple[str, str]]:
    """The questions about a prompt with their answers; none where its metadata hold anything
    else.
    """
    listed = prompt.metadata.get("vqa_list")
    if not isinstance(listed, Sequence) or isinstance(listed, str):
        return []
    pairs = [
        tuple(pair) for pair in listed if isinstance(pair, Sequence) and not isinstance(pair, str)
    ]
    texts = [
        pair for pair in pairs if len(pair) == 2 and all(isinstance(text, str) for text in pair)
    ]
    return texts if len(texts) == len(listed) else []


def chance(reply: Reply, question: str, answer: str) -> float:
    """The probability that the reply begins with a variant of `answer`."""
    return sum(reply.first_token.get(token, 0.0) for token in variants(question, answer))


def _means(chances: Sequence[float], skills: Sequence[str]) -> dict[str, float]:
    log_mean = sum(math.log(p) if p > 0 else -math.inf for p in chances) / len(chances)
    means = {"geometric": math.exp(log_mean), "arithmetic": sum(chances) / len(chances)}
    by_skill = defaultdict(list)
    if len(skills) == len(chances):
        for skill, p in zip(skills, chances, strict=True):
            by_skill[f"skill_{skill}".replace("/", "_")].append(p)
    return means | {name: sum(own) / len(own) for name, own in by_skill.items()}
