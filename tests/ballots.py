"""Folders of votes for tests: pictures of one colour each, and what was said of them."""

import hashlib
from dataclasses import asdict

from PIL import Image

from flowrl.votes.album import write_pairs
from flowrl.votes.files import Vote, cast, read_pairs

TIME = "2026-12-01T12:00:00+00:00"
RED = (200, 40, 40)
GREEN = (40, 200, 40)
BLUE = (40, 40, 200)
GREY = (90, 90, 90)


def plain(colour, side=8):
    """A picture of one colour."""
    return Image.new("RGB", (side, side), colour)


def digest(text):
    """A digest as a picture's file may have one."""
    return hashlib.sha256(text.encode()).hexdigest()


def vote_on(pair, choice, tab="a"):
    """A vote on a pair."""
    names = ("left", "right", "prompt", "iteration")
    return Vote(**{name: asdict(pair)[name] for name in names}, choice=choice, time=TIME, tab=tab)


def fill(folder, said, iteration=0):
    """Write pairs of pictures of `said`, (left, right, choice) each, and vote where there is a
    choice; return the pairs in their order.
    """
    for number, (left, right, _) in enumerate(said):
        write_pairs(folder, [(f"prompt {number}", left, right)], iteration)
    pairs = list(read_pairs(folder).values())[-len(said) :]
    for pair, (_, _, choice) in zip(pairs, said, strict=True):
        if choice is not None:
            cast(folder, vote_on(pair, choice))
    return pairs
