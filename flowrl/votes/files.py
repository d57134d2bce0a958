"""The files of a folder of votes: pictures, the pairs that they make, and what people said of them.

    pictures/DIGEST.png    a picture, named by the SHA-256 of its file
    pairs.jsonl            one pair a line, which training writes
    votes.jsonl            one vote a line, which the page writes
    status.json            what training does or waits for, for the page alone

The two lists only grow, by whole lines. A line that a kill cut off is no line: it is ended before
the next one is written, and passed over by whoever reads.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar, get_args

from flowrl.errors import UserError
from flowrl.runs.files import damaged

FOLDER = "votes"
"""The folder of votes in a run's own."""
PICTURES = "pictures"
PAIRS = "pairs.jsonl"
VOTES = "votes.jsonl"
STATUS = "status.json"

Choice = Literal["left", "right", "equal", "undone"]
"""Which picture a person prefers, neither of them, or that the pair's last vote does not count."""

SEEN_SECONDS = 60.0
"""Until a pair that was on a screen counts as out of sight; the page asks anew every two."""

DIGEST = re.compile(r"[0-9a-f]{64}")
"""A name of a picture, which must lead to no other file."""

Entry = TypeVar("Entry", bound="Pair")


class AlreadyVoted(Exception):
    """The pair has a vote that counts, or, where one is to be undone, none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two pictures of one prompt, by their digests, and the iteration that drew them; 0 is before
    the first.
    """

    left: str
    right: str
    prompt: str
    iteration: int

    @property
    def key(self) -> str:
        """The name of the pair: that of any two pictures is always the same, whichever is on the
        left.
        """
        first, second = sorted((self.left, self.right))
        return hashlib.sha256(f"{first} {second}".encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote(Pair):
    """One person's word on a pair; `time` is in ISO 8601, and `tab` the browser's tab."""

    choice: Choice
    time: str
    tab: str


@dataclass(frozen=True, slots=True)
class Ballot:
    """The votes in the first `num_lines` lines of a list: of each pair the last one, unless it was
    undone, in the order of their lines; and the `digest` of these lines.
    """

    votes: tuple[Vote, ...]
    num_lines: int
    digest: str
    num_damaged: int


def picture_path(folder: Path, digest: str) -> Path:
    """Return the file of the picture with a digest."""
    return folder / PICTURES / f"{digest}.png"


def has_pictures(folder: Path, pair: Pair) -> bool:
    """Tell whether both pictures of a pair are still there."""
    return all(picture_path(folder, digest).is_file() for digest in (pair.left, pair.right))


def mark_as_seen(folder: Path, pair: Pair) -> None:
    """Note that a pair is on a screen, by the times of its pictures' files; `remove_old` leaves it
    there.
    """
    for digest in (pair.left, pair.right):
        # What is gone, or belongs to another user, cannot be kept.
        with suppress(OSError):
            os.utime(picture_path(folder, digest))


def is_seen(folder: Path, pair: Pair) -> bool:
    """Tell whether a pair has been on a screen in the last `SEEN_SECONDS`, or is as new."""
    with suppress(OSError):
        seen = min(picture_path(folder, name).stat().st_mtime for name in (pair.left, pair.right))
        return time.time() - seen < SEEN_SECONDS
    return False


def append(path: Path, entry: Pair) -> None:
    """Add an entry as a line to a list, and wait until the disk has it."""
    with locked(path) as file:
        _append(file, entry)


@contextmanager
def locked(path: Path) -> Iterator[BinaryIO]:
    """Open a list, which is made where it is not there, for one writer at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # given back when the file is closed
        yield file


def _append(file: BinaryIO, entry: Pair) -> None:
    """Add a line to an open list, after the end of one that a kill cut off."""
    size = file.seek(0, os.SEEK_END)
    start = b""
    if size:
        file.seek(size - 1)
        start = b"" if file.read(1) == b"\n" else b"\n"
    text = json.dumps(asdict(entry), ensure_ascii=False)
    # One call, so that a kill leaves the beginning of one line at most.
    file.write(start + text.encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def read_pairs(folder: Path) -> dict[str, Pair]:
    """Read all pairs by their keys, in the order in which they were drawn."""
    pairs = {}
    for line in _lines(_content(folder / PAIRS)):
        pair = _read(Pair, line)
        if pair is not None:
            pairs[pair.key] = pair
    return pairs


def read_votes(folder: Path, num_lines: int | None = None) -> Ballot:
    """Read the votes in the first `num_lines` lines, None for all of them.

    Raises UserError where there are fewer.
    """
    path = folder / VOTES
    lines = _lines(_content(path))
    if num_lines is not None and num_lines > len(lines):
        raise damaged(
            path, f"{num_lines} lines were there, {len(lines)} are", "restore it from a copy"
        )
    lines = lines[:num_lines]
    standing: dict[str, Vote] = {}
    num_damaged = 0
    for line in lines:
        vote = _read(Vote, line)
        if vote is None:
            num_damaged += 1
            continue
        standing.pop(vote.key, None)
        if vote.choice != "undone":
            standing[vote.key] = vote
    digest = hashlib.sha256(b"".join(line + b"\n" for line in lines)).hexdigest()
    return Ballot(tuple(standing.values()), len(lines), digest, num_damaged)


def open_pairs(folder: Path) -> list[Pair]:
    """List the pairs without a vote that counts, whose pictures are there, oldest first."""
    voted = {vote.key for vote in read_votes(folder).votes}
    pairs = read_pairs(folder).values()
    return [pair for pair in pairs if pair.key not in voted and has_pictures(folder, pair)]


def usable_votes(folder: Path, ballot: Ballot) -> list[Vote]:
    """List the votes that scores can be fitted to, those whose pictures are there."""
    names = {path.stem for path in (folder / PICTURES).glob("*.png")}
    return [vote for vote in ballot.votes if {vote.left, vote.right} <= names]


def voted_pictures(folder: Path) -> set[str]:
    """Return the digests of all pictures that any vote is about, also one that was undone."""
    digests = set()
    for line in _lines(_content(folder / VOTES)):
        vote = _read(Vote, line)
        if vote is not None:
            digests |= {vote.left, vote.right}
    return digests


def cast(folder: Path, vote: Vote) -> None:
    """Add a vote to the list. Raises AlreadyVoted where its pair has one that counts or, for one
    that undoes, none.

    The list is locked meanwhile, so that of two who vote on one pair at once one is refused.
    """
    with locked(folder / VOTES) as file:
        is_voted = vote.key in {other.key for other in read_votes(folder).votes}
        if is_voted != (vote.choice == "undone"):
            raise AlreadyVoted
        _append(file, vote)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); look at its rights") from error


def _lines(content: bytes) -> list[bytes]:
    """Return the whole lines; what stands behind the last one's end is being written, or torn."""
    return content.split(b"\n")[:-1]


def _read(kind: type[Entry], line: bytes) -> Entry | None:
    """Read a line; return None for one that was torn, or written by hand in another form."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    names = [field.name for field in fields(kind)]
    if not isinstance(values, dict) or any(name not in values for name in names):
        return None
    return kind(**{name: values[name] for name in names}) if _is_entry(values) else None


def _is_entry(values: Mapping[str, Any]) -> bool:
    """Tell whether the values of a line are of their kinds."""
    texts = [values.get(name, "") for name in ("left", "right", "prompt", "time", "tab")]
    if not all(isinstance(text, str) for text in texts):
        return False
    is_pair = all(DIGEST.fullmatch(values[side]) for side in ("left", "right"))
    is_choice = values.get("choice", "left") in get_args(Choice)
    return is_pair and is_choice and isinstance(values["iteration"], int)
