"""The text side of a pipeline: loaded at the first prompt, dropped when every prompt is
embedded.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
import transformers

from flowrl.parallel.launcher import local_rank

Limits = Mapping[str, int]
"""Names of a pipeline's tokenizers, and how many tokens each may give."""


class TextEncoders:
    """`load()` gives a pipeline with text encoders and tokenizers; it is kept from `pipeline()` to
    `drop()`.

    Encoders run on a GPU where there is one, one process's on its own, whatever the transformer's
    place.
    """

    def __init__(self, load: Callable[[], Any], names: Sequence[str]) -> None:
        self._load = load
        self._names = names
        self._pipeline: Any = None

    def pipeline(self) -> Any:
        """Return the pipeline, its encoders frozen and in place."""
        if self._pipeline is None:
            self._pipeline = self._load()
            # Tokenizers are among the names too, and are neither frozen nor moved.
            for name in self._names:
                encoder = getattr(self._pipeline, name, None)
                if isinstance(encoder, torch.nn.Module):
                    encoder.requires_grad_(False).eval().to(device())
        return self._pipeline

    def drop(self) -> None:
        """Free the encoders; the next prompt would load them again."""
        self._pipeline = None
        # PyTorch keeps freed memory to itself, where no other process of the device can have it.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def truncated_part(self, text: str, limits: Limits) -> str:
        """Return the part of a text that the first tokenizer to cut it leaves out, in words; empty
        where none does.
        """
        for name, limit in limits.items():
            lost = _beyond(getattr(self.pipeline(), name), text, limit)
            if lost:
                beginning = textwrap.shorten(lost, 240)
                return f"{beginning!r} beyond the {limit} tokens of the model's {name}"
        return ""


def device() -> torch.device:
    """Return this process's GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank())


@contextmanager
def quiet() -> Iterator[None]:
    """Run without the libraries' own warnings of long prompts, which come for every batch."""
    modules = (diffusers.utils.logging, transformers.utils.logging)
    levels = [module.get_verbosity() for module in modules]
    for module in modules:
        module.set_verbosity_error()
    try:
        yield
    finally:
        for module, level in zip(modules, levels, strict=True):
            module.set_verbosity(level)


def _beyond(tokenizer: Any, text: str, limit: int) -> str:
    """Return the part of a text that lies beyond `limit` tokens; where the tokenizer closes texts,
    the last of them is its mark.
    """
    # FLUX.2-dev's is a processor, which has the tokenizer inside.
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    ids = tokenizer(text, verbose=False).input_ids
    if len(ids) <= limit:
        return ""
    # Cut texts are closed as well, so that the mark takes the place of a token.
    is_closed = ids[-1] in tokenizer.all_special_ids
    num_seen = limit - 1 if is_closed else limit
    unseen = str(tokenizer.decode(ids[num_seen:], skip_special_tokens=True)).strip()
    # A chat template closes a prompt by tokens that are no words.
    return unseen or "its closing tokens"
