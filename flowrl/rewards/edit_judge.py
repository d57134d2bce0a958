"""A judge compares a picture with its edit, and says how well the instruction was followed.

What is asked, and how the answers become one number, is as in VIEScore (Ku et al. 2023,
arXiv 2312.14867). The words are FlowRL's own, so that numbers are comparable among its runs, not
with published ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import cache

import torch

from flowrl.rewards.client import Unanswered
from flowrl.rewards.judge import Judge, Question, Reply
from flowrl.rewards.outputs import scores_or_reasons
from flowrl.rewards.protocol import Images
from flowrl.types import Prompt, RewardOutput

EDIT = (
    "The first image is a picture, the second one what an editor made of it when given this "
    "instruction: [{instruction}]\n"
    "Give two whole numbers from 0 to 10.\n"
    "followed: how well the second image does what the instruction asks (0 not at all, 10 in "
    "full).\n"
    "kept: how well everything that the instruction does not speak of is kept as it was (0 another "
    "picture, 10 as much as the instruction allows).\n"
    "Write a sentence on each, and then one line: Scores: followed, kept"
)
"""The question about both pictures."""

QUALITY = (
    "Judge this image by itself, without asking what it shows.\n"
    "Give two whole numbers from 0 to 10.\n"
    "natural: how natural it looks in light, shadow, distance and proportion (0 not at all, 10 as "
    "a photograph or drawing of its kind would).\n"
    "clean: how free it is of blur, seams, distorted bodies and other traces of a machine (0 full "
    "of them, 10 free of them).\n"
    "Write a sentence on each, and then one line: Scores: natural, clean"
)
"""The question about the edit alone."""

HEADING = re.compile(r"\bscores\b[ *_]*:", re.IGNORECASE)
PARTS = ("followed", "kept", "natural", "clean")
"""What is asked for: the first two of both pictures, the others of the edit alone."""


class EditJudge:
    """The geometric mean of how well an edit was made and how good it looks, in [0, 1].

    How well it was made is the lesser of `followed` and `kept`, so that a picture that was left as
    it is scores as badly as another picture; how good it looks is the lesser of `natural` and
    `clean`. These four are the parts. It has nothing to say about prompts without a picture; a
    sample with a reply that holds no two numbers from 0 to 10 is missing.
    """

    reads_pictures = True

    part_names = PARTS

    def __init__(self, *, judge: Judge) -> None:
        self.judge = judge

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        edits = [image for image, prompt in enumerate(prompts) if prompt.image is not None]
        # Both questions of every edit at once: two replies an edit, in this order.
        questions = []
        for image in edits:
            # Not str.format: an instruction may hold braces.
            text = EDIT.replace("{instruction}", prompts[image].text)
            questions.append(Question(image, text, source=prompts[image].image))
            questions.append(Question(image, QUALITY))
        replies = self.judge.ask(images, questions)
        scores: list[float | str] = [math.nan] * len(prompts)
        parts = torch.full((len(PARTS), len(prompts)), torch.nan)
        for image, edit, quality in zip(edits, replies[::2], replies[1::2], strict=True):
            made, looks = _pair(edit, PARTS[:2]), _pair(quality, PARTS[2:])
            if isinstance(made, str) or isinstance(looks, str):
                scores[image] = made if isinstance(made, str) else str(looks)
            else:
                scores[image] = math.sqrt(min(made) * min(looks))
                parts[:, image] = torch.tensor([*made, *looks])
        values, info = scores_or_reasons(scores)
        applies = torch.tensor([prompt.image is not None for prompt in prompts])
        return RewardOutput(
            values=values.nan_to_num(0.0),
            is_valid=values.isfinite() | ~applies,
            parts=dict(zip(PARTS, parts, strict=True)),
            info=info,
            applies=applies[:, None],  # one column, as of a single reward term
        )


def _pair(reply: Reply | Unanswered, names: tuple[str, str]) -> tuple[float, float] | str:
    """Read the two scores of these names in a reply, over 10, or say why it has none."""
    if isinstance(reply, Unanswered):
        return str(reply)
    reason = f"no 'Scores:' with two numbers from 0 to 10 in {reply.text[-200:]!r}"
    headings = list(HEADING.finditer(reply.text))
    if not headings:
        return reason
    # The last one alone: others may be quoted from the instruction, or from what an image shows.
    verdict = _verdict(*names).match(reply.text, headings[-1].end())
    if verdict is None or reply.may_lack_digits(verdict.end(2)):
        return reason
    first, second = float(verdict[1]), float(verdict[2])
    return reason if max(first, second) > 10 else (first / 10, second / 10)


@cache
def _verdict(first: str, second: str) -> re.Pattern[str]:
    """Return what a line of two scores looks like, to its end: each alone or after its name, as a
    number or over 10, in bold or brackets.
    """
    mark = r"[ *_:=()\[\]]*"
    number = r"(\d+(?:\.\d+)?)(?: ?/ ?10)?"
    scores = [rf"{mark}(?:{name}\b)?{mark}{number}{mark}" for name in (first, second)]
    return re.compile(rf"{','.join(scores)}\.?\s*?$", re.IGNORECASE | re.MULTILINE)
