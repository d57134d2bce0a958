"""Pictures that are put before people: chosen among an iteration's, written, and removed where
nobody voted on them.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from flowrl.runs.files import replacing
from flowrl.types import Prompt
from flowrl.votes.files import (
    PAIRS,
    Pair,
    append,
    is_seen,
    open_pairs,
    picture_path,
    read_pairs,
    voted_pictures,
)

Drawn = tuple[str, Image.Image, Image.Image]
"""A prompt's text and two of its pictures."""


class Album:
    """The first two different pictures of each of an iteration's first `num_pairs` prompts, in the
    order in which they are offered.
    """

    def __init__(self, num_pairs: int) -> None:
        self.num_pairs = num_pairs
        self.single: dict[str, Image.Image] = {}
        self.pairs: dict[str, Drawn] = {}

    def offer(self, prompts: Sequence[Prompt], show: Callable[[int], Image.Image]) -> None:
        """Take what is wanted of some pictures; `show` gives the one in a row, for its prompt."""
        for row, prompt in enumerate(prompts):
            key = prompt.key
            if key in self.single:
                if key not in self.pairs:
                    self._complete(prompt, show(row))
            elif len(self.single) < self.num_pairs:
                self.single[key] = show(row)

    def _complete(self, prompt: Prompt, picture: Image.Image) -> None:
        """Make a pair of a prompt's two pictures, unless they are equal: one may be shown twice."""
        first = self.single[prompt.key]
        if first.tobytes() != picture.tobytes():
            self.pairs[prompt.key] = (prompt.text, first, picture)


def write_pairs(folder: Path, drawn: Sequence[Drawn], iteration: int) -> int:
    """Write pictures, and then the pairs that they make, to the list; return how many are new.

    A pair that is there already, as when a resumed run draws it again, is not listed twice.
    """
    known = read_pairs(folder)
    num_new = 0
    for prompt, left, right in drawn:
        pair = Pair(
            left=_write_picture(folder, left),
            right=_write_picture(folder, right),
            prompt=prompt,
            iteration=iteration,
        )
        if pair.key not in known:
            append(folder / PAIRS, pair)
            known[pair.key] = pair
            num_new += 1
    return num_new


def _write_picture(folder: Path, picture: Image.Image) -> str:
    """Write a picture under its digest, whole or not at all, and return that."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    content = buffer.getvalue()
    digest = hashlib.sha256(content).hexdigest()
    path = picture_path(folder, digest)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        with replacing(path) as partial:
            partial.write_bytes(content)
    return digest


def remove_old(folder: Path, keep: int) -> None:
    """Remove the pictures of all pairs without a vote but the newest `keep`, and those that are on
    a screen.

    Those of a vote stay, also of one that was undone: earlier fits may be made again.
    """
    waiting = open_pairs(folder)
    needed = voted_pictures(folder)
    old = [pair for pair in waiting[:-keep] if not is_seen(folder, pair)]
    for pair in set(waiting) - set(old):
        needed |= {pair.left, pair.right}
    for pair in old:
        for digest in {pair.left, pair.right} - needed:
            picture_path(folder, digest).unlink(missing_ok=True)
