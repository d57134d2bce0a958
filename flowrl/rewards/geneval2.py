"""GenEval2's Soft-TIFA asks how sure a judge is of the right answer to each question about a
prompt's atoms.

Kamath et al. 2025, arXiv 2512.16853. A prompt's metadata hold `vqa_list`, pairs of a question and
its answer, and may hold `skills`, one for each question.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from flowrl.errors import UserError
from flowrl.rewards.client import Unanswered
from flowrl.rewards.judge import Judge, Question, Reply
from flowrl.rewards.outputs import REASON, finite_valid
from flowrl.rewards.protocol import Images
from flowrl.types import Prompt, RewardOutput
from flowrl.values.check import checked
from flowrl.values.texts import are_pairs

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
MEANS = ("geometric", "arithmetic")

Pair = tuple[str, str]
"""A question with its right answer."""


def variants(question: str, answer: str) -> set[str]:
    """Return the first tokens that count as `answer`: capitalised or not, after a space or not,
    numbers up to ten as digits.
    """
    lower = answer.lower()
    words = {answer, answer.capitalize()}
    if not question.startswith("How many"):
        words.add(lower)
    elif lower in NUMBERS:
        digits = NUMBERS.index(lower)
        words.add(str(digits))
    # Many tokenizers begin a word with its space.
    return words | {f" {word}" for word in words}


class GenEval2:
    """The mean over a prompt's questions of their scores: `geometric` is the benchmark's
    prompt-level score, `arithmetic` its atom-level one.

    A question's score is the probability of the right answer's first token, summed over its
    `variants`, asked as "QUESTION Answer in one word.". Published code sums over the whole
    vocabulary and counts a token twice that two variants begin with; here a token outside the
    judge's `top_logprobs` counts 0, and each counts once.

    Parts: geometric, arithmetic, and skill_NAME, the arithmetic mean over the questions of one
    skill. A sample without questions, or with a question that got no reply, is missing. Raises
    UserError for a judge that gives no probabilities.
    """

    @checked("reward")
    def __init__(self, *, mean: Literal["geometric", "arithmetic"], judge: Judge) -> None:
        if judge.top_logprobs < 1:
            raise UserError(
                f"judge.top_logprobs={judge.top_logprobs} must be at least 1 for geneval2"
            )
        self.mean = mean
        self.judge = judge

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        pairs_of = [_pairs(prompt) for prompt in prompts]
        questions: list[Question] = []
        for image, pairs in enumerate(pairs_of):
            for question, _ in pairs:
                questions.append(Question(image, f"{question} Answer in one word."))
        # All questions are asked at once; each prompt then takes its replies from the front.
        replies = iter(self.judge.ask(images, questions))
        info: list[Mapping[str, object]] = []
        scores: list[dict[str, float]] = []
        for prompt, pairs in zip(prompts, pairs_of, strict=True):
            replies_of_prompt = list(islice(replies, len(pairs)))
            chances = _chances(prompt, pairs, replies_of_prompt)
            if isinstance(chances, str):
                info.append({REASON: chances})
                scores.append({})
                continue
            skills = prompt.metadata.get("skills") or ()
            info.append({"answers": chances})
            scores.append(_means(chances, skills))
        # A prompt without a score is NaN in every column, which marks it as missing.
        parts = _columns(scores)
        return finite_valid(parts[self.mean], parts, info)


def _pairs(prompt: Prompt) -> list[Pair]:
    """Return the questions about a prompt with their answers; none where its metadata hold
    anything else.
    """
    listed = prompt.metadata.get("vqa_list")
    if not are_pairs(listed):
        return []
    return [(question, answer) for question, answer in listed]


def _chances(
    prompt: Prompt,
    pairs: Sequence[Pair],
    replies: Sequence[Reply | Unanswered],
) -> list[float] | str:
    """Return the probability of each right answer, or why there are none."""
    if not pairs:
        return f"prompt {prompt.text!r} has no vqa_list, pairs of texts, in its metadata"
    chances = []
    for reply, (question, answer) in zip(replies, pairs, strict=True):
        if isinstance(reply, Unanswered):
            return str(reply)
        chances.append(chance(reply, question, answer))
    return chances


def chance(reply: Reply, question: str, answer: str) -> float:
    """Return the probability that the reply begins with a variant of `answer`."""
    tokens = variants(question, answer)
    return sum(reply.first_token.get(token, 0.0) for token in tokens)


def _means(chances: Sequence[float], skills: Sequence[str]) -> dict[str, float]:
    """Compute a prompt's score in both means, and the arithmetic mean of each skill.

    `chances` holds one probability or more; a single 0 among them makes the geometric mean 0.
    """
    logs = [math.log(p) if p > 0 else -math.inf for p in chances]
    log_mean = sum(logs) / len(chances)
    means = {"geometric": math.exp(log_mean), "arithmetic": sum(chances) / len(chances)}
    by_skill = defaultdict(list)
    # Skills that are not one for each question say nothing of any.
    if len(skills) == len(chances):
        for skill, probability in zip(skills, chances, strict=True):
            # Names of parts become names of metrics, where a slash would open a new level.
            name = f"skill_{skill}".replace("/", "_")
            by_skill[name].append(probability)
    for name, probabilities in by_skill.items():
        means[name] = sum(probabilities) / len(probabilities)
    return means


def _columns(scores: Sequence[Mapping[str, float]]) -> dict[str, Float[Tensor, "B"]]:
    """Put the prompts' scores into one tensor a name, NaN where a prompt has none of that name."""
    names = dict.fromkeys(MEANS)  # a set that keeps its order
    for score in scores:
        names |= dict.fromkeys(score)
    columns = {}
    for name in names:
        column = [score.get(name, math.nan) for score in scores]
        columns[name] = torch.tensor(column)
    return columns
