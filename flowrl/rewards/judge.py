"""A vision-language judge is asked behind an OpenAI-compatible server, such as `vllm serve MODEL`
starts one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from flowrl.errors import UserError
from flowrl.images.pictures import read_upright
from flowrl.rewards import wire
from flowrl.rewards.client import Client, Unanswered, Unfit, check_url
from flowrl.rewards.images import to_pictures
from flowrl.rewards.protocol import Images
from flowrl.types import PictureFile
from flowrl.values.bounds import Count, Natural, Text
from flowrl.values.check import checked

Read = TypeVar("Read")
UNUSABLE = (
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    RecursionError,
    OverflowError,
)
"""Errors in reading an answer that has not the form it should have."""


@dataclass(frozen=True, slots=True)
class Question:
    """A text that asks about one image of a batch, by its number; the picture that the image is an
    edit of is shown before it where there is a `source`.
    """

    image: int
    text: str
    source: PictureFile | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """A text that the judge wrote, the probabilities of its likeliest first tokens, and whether it
    was cut off for its length.
    """

    text: str
    first_token: Mapping[str, float]
    was_cut: bool = False

    def may_lack_digits(self, end: int) -> bool:
        """Tell whether a number that ends at this character may have been cut short."""
        return self.was_cut and not self.text[end:].strip()


class Judge:
    """A judge that asks `model` at `url` (the server's address, with or without /v1), one request a
    question, decoding greedily.

    A reply has at most `max_tokens` tokens; `top_logprobs` first tokens come with their probability
    (0: none; vLLM gives at most 20 unless started with --max-logprobs).
    """

    @checked("judge")
    def __init__(
        self,
        *,
        url: Text,
        model: Text,
        max_tokens: Count,
        top_logprobs: Natural,
        client: Client,
    ) -> None:
        self.url = check_url(url, "/chat/completions", "/pooling", "/v1")
        self.model = model
        self.client = client
        self.max_tokens = max_tokens
        self.top_logprobs = top_logprobs

    def examine(self) -> None:
        """Ask for the models that the server has.

        Raises Unavailable where nothing answers, and Unfit for a server that lacks the model or is
        no such server.
        """
        status, content = self.client.probe(f"{self.url}/v1/models")
        try:
            models = json.loads(content)["data"]
            names = [str(model["id"]) for model in models]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise Unfit(
                f"{self.url}/v1/models answers HTTP {status} {content[:60]!r}, as no "
                "OpenAI-compatible server does",
                "url",
            ) from None
        if self.model not in names:
            others = ", ".join(names) or "none"
            raise Unfit(f"{self.url} has no model {self.model!r} but {others}", "model")

    def ask(self, images: Images, questions: Sequence[Question]) -> list[Reply | Unanswered]:
        """Return the reply to each question, or why there is none (/v1/chat/completions).

        Several questions may ask about one image. Replies come in the order of the questions.
        """
        options: dict[str, Any] = {
            "max_tokens": self.max_tokens,
            "temperature": 0,  # greedy: the likeliest token each time
        }
        if self.top_logprobs:
            options |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        return self._post("/v1/chat/completions", images, questions, options, _reply)

    def pool(self, images: Images, questions: Sequence[Question]) -> list[list[float] | Unanswered]:
        """Return the outputs of a reward model's head for each question, or why there are none
        (/pooling).
        """
        options = {"encoding_format": "float"}  # not base64
        return self._post("/pooling", images, questions, options, _pooled)

    def _post(
        self,
        path: str,
        images: Images,
        questions: Sequence[Question],
        options: Mapping[str, Any],
        read: Callable[[Any], Read],
    ) -> list[Read | Unanswered]:
        """Send each question with its images as a chat of one message, and read the answers."""
        # Each image is encoded once, however many questions there are about it.
        asked = {question.image for question in questions}
        pictures = {i: shown for i, shown in enumerate(to_pictures(images)) if i in asked}
        contents = {i: _content(picture) for i, picture in pictures.items()}
        sources: dict[tuple[str, tuple[int, int]], dict[str, Any]] = {}
        requests = []
        for question in questions:
            content = [contents[question.image], {"type": "text", "text": question.text}]
            if question.source is not None:
                size = pictures[question.image].size
                key = (question.source.digest, size)
                if key not in sources:
                    sources[key] = _content(_source(question.source, size))
                content.insert(0, sources[key])
            message = {"role": "user", "content": content}
            requests.append({"model": self.model, "messages": [message], **options})
        answers = self.client.post_all(self.url + path, requests)
        return [self._read(answer, read) for answer in answers]

    def _read(self, answer: bytes | Unanswered, read: Callable[[Any], Read]) -> Read | Unanswered:
        """Read an answer; one that has not the form it should have is no answer."""
        if isinstance(answer, Unanswered):
            return answer
        try:
            return read(json.loads(answer))
        except UNUSABLE as error:
            return Unanswered(f"{self.url}: unusable answer: {type(error).__name__}: {error}")


def _source(file: PictureFile, size: tuple[int, int]) -> Image.Image:
    """Read the picture that an image is an edit of, no larger than that image: a camera's picture
    would fill the judge's context, and its sharpness would count against the edit.
    """
    picture = read_upright(Path(file.path))
    picture.thumbnail(size)
    return picture


def _content(picture: Image.Image) -> dict[str, Any]:
    """Write a picture as a part of a message."""
    url = f"data:image/png;base64,{wire.png(picture)}"
    return {"type": "image_url", "image_url": {"url": url}}


def _reply(data: Any) -> Reply:
    """Read the answer of /v1/chat/completions."""
    choice = data["choices"][0]
    text = choice["message"]["content"]
    if not isinstance(text, str):
        raise UserError(f"the message holds no text but {type(text).__name__}")
    logprobs = choice.get("logprobs")
    # Only the first token's are read, though every token has some.
    tops = logprobs["content"][0]["top_logprobs"] if logprobs else []
    # By token text: two tokens of one text cannot be told apart here, and each probability counts
    # once.
    chances = {}
    for top in tops:
        log_chance = min(float(top["logprob"]), 0.0)  # rounding may lift it above 0
        chances[str(top["token"])] = math.exp(log_chance)
    if not all(math.isfinite(chance) for chance in chances.values()):
        raise UserError("a log-probability is not a number")
    return Reply(text, chances, was_cut=choice.get("finish_reason") == "length")


def _pooled(data: Any) -> list[float]:
    """Read the answer of /pooling."""
    values = data["data"][0]["data"]
    if isinstance(values[0], list):  # one row a token: the last one has seen everything
        values = values[-1]
    if not values:
        raise UserError("the head gave no numbers")
    return [float(value) for value in values]
