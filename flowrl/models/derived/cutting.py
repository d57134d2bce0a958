"""What a pipeline's tokenizers cut off a prompt, learnt from how they are called for another."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Cut:
    """A call of a tokenizer that cuts texts: the name of its component, the text that it was given,
    with whatever template, and how many tokens it leaves.
    """

    tokenizer: str
    text: str
    limit: int


@contextmanager
def watching(pipeline: Any) -> Iterator[list[Cut]]:
    """Collect the calls of a pipeline's tokenizers that cut texts."""
    cuts: list[Cut] = []
    kinds: list[tuple[Any, type[Any]]] = []
    for name, part in pipeline.components.items():
        # A processor of texts and pictures has its tokenizer inside.
        tokenizer = getattr(part, "tokenizer", part)
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            kinds.append((tokenizer, type(tokenizer)))
            tokenizer.__class__ = _watched(type(tokenizer), name, cuts)
    try:
        yield cuts
    finally:
        # Backwards, since one tokenizer may be in two components.
        for tokenizer, kind in reversed(kinds):
            tokenizer.__class__ = kind


def _watched(kind: type[Any], name: str, cuts: list[Cut]) -> type[Any]:
    """Return the class of a tokenizer that notes its calls."""
    signature = inspect.signature(kind.__call__)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        # False, None or "do_not_truncate" leaves texts whole.
        if given.get("truncation") not in (None, False, "do_not_truncate"):
            limit = given.get("max_length") or self.model_max_length
            texts = given.get("text") or []
            texts = [texts] if isinstance(texts, str) else texts
            cuts.extend(Cut(name, text, limit) for text in texts if isinstance(text, str))
        return kind.__call__(self, *args, **kwargs)

    return type(kind.__name__, (kind,), {"__call__": call})
